package sanitytests

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// writer appends synced records to a file until it is stopped; each record names its number.
type writer struct {
	path    string
	stop    chan struct{}
	ended   sync.WaitGroup
	written atomic.Int64
	slowest atomic.Int64
	err     atomic.Pointer[error]
}

const recordSize = 4096

// startWriter writes to a new file on a mounted volume.
func startWriter(t *testing.T, path string) *writer {
	t.Helper()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|syscall.O_SYNC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	w := &writer{path: path, stop: make(chan struct{})}
	w.ended.Go(func() {
		defer file.Close()
		for n := int64(0); ; n++ {
			select {
			case <-w.stop:
				return
			default:
			}
			began := time.Now()
			if _, err := file.WriteAt(record(n), n%4096*recordSize); err != nil {
				w.err.Store(&err)
				return
			}
			w.slowest.Store(max(w.slowest.Load(), int64(time.Since(began))))
			w.written.Add(1)
		}
	})
	t.Cleanup(func() { w.halt() })
	return w
}

func record(n int64) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(n)+1), recordSize/8)
}

func (w *writer) halt() {
	select {
	case <-w.stop:
	default:
		close(w.stop)
	}
	w.ended.Wait()
}

// goesOn waits until more records are written, without an error.
func (w *writer) goesOn(t *testing.T, records int64) {
	t.Helper()
	wanted := w.written.Load() + records
	eventually(t, 30*time.Second, "the writer goes on", func() (bool, string) {
		if err := w.err.Load(); err != nil {
			t.Fatalf("the writer failed: %v", *err)
		}
		return w.written.Load() >= wanted, fmt.Sprintf("%d of %d records", w.written.Load(), wanted)
	})
}

// finish stops the writer and checks the last records that it wrote.
func (w *writer) finish(t *testing.T) {
	t.Helper()
	w.halt()
	if err := w.err.Load(); err != nil {
		t.Fatalf("the writer failed: %v", *err)
	}
	t.Logf("%d records, the slowest took %s", w.written.Load(), time.Duration(w.slowest.Load()))
	w.verify(t, w.path)
}

// verify checks that a file holds what was written last.
func (w *writer) verify(t *testing.T, path string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	total := w.written.Load()
	for n := max(0, total-4096); n < total; n++ {
		at := n % 4096 * recordSize
		if int64(len(content)) < at+recordSize || !bytes.Equal(content[at:at+recordSize], record(n)) {
			t.Fatalf("record %d is not what was written", n)
		}
	}
}
