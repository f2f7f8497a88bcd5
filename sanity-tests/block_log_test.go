package sanitytests

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// blockLog writes random blocks of a file or device past the page cache, and remembers which content was acknowledged last.
//
// Each writer has blocks of its own, so at most one content of a block is on its way. At its end more writers meet on the
// same blocks: nobody knows what is in them afterwards, but all replicas must have the same.
type blockLog struct {
	path    string
	offset  int64
	seed    int64
	stop    chan struct{}
	writers sync.WaitGroup
	ended   chan struct{}
	// acknowledged counts requests.
	acknowledged atomic.Int64
	slowest      atomic.Int64
	err          atomic.Pointer[error]
	// last is the number of the write whose content each block holds, acknowledged: 0 none yet, below 0 a write of zeroes. A writer touches only its own part.
	last []int64
}

const (
	logBlock     = 4096
	logWriters   = 4
	writerBlocks = 1024
	logBlocks    = logWriters * writerBlocks
	// sharedBlocks come behind those that are looked at.
	sharedBlocks  = 64
	sharedWriters = 6
	logSize       = (logBlocks + sharedBlocks) * logBlock
	longestRun    = 16
	// answeredWithin is far above every wait of the data path while replicas are left.
	answeredWithin = 30 * time.Second
	// punchHole and keepSize are of fallocate(2): on a device they become a write of zeroes.
	keepSize, punchHole = 1, 2
)

// startBlockLog writes logSize bytes of a file or device from an offset on, until it is halted.
func startBlockLog(t *testing.T, path string, offset, seed int64) *blockLog {
	t.Helper()
	l := &blockLog{path: path, offset: offset, seed: seed, stop: make(chan struct{}), ended: make(chan struct{}), last: make([]int64, logBlocks)}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_DIRECT, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	for n := range logWriters {
		l.start(t, seed+int64(n), func(random *rand.Rand, buffer []byte) error { return l.writeOwn(file, n, random, buffer) })
	}
	for n := range sharedWriters {
		l.start(t, seed+int64(logWriters+n), func(random *rand.Rand, buffer []byte) error { return l.writeShared(file, random, buffer) })
	}
	go func() {
		l.writers.Wait()
		close(l.ended)
		file.Close()
	}()
	t.Cleanup(func() { l.halt(t) })
	return l
}

// start runs one writer, which repeats a piece of work with a buffer that is fit for O_DIRECT.
func (l *blockLog) start(t *testing.T, seed int64, work func(*rand.Rand, []byte) error) {
	t.Helper()
	buffer := directBuffer(t, sharedBlocks*logBlock)
	random := rand.New(rand.NewSource(seed))
	l.writers.Go(func() {
		for {
			select {
			case <-l.stop:
				return
			default:
			}
			began := time.Now()
			if err := work(random, buffer); err != nil {
				err = fmt.Errorf("after %s: %w", time.Since(began), err)
				l.err.CompareAndSwap(nil, &err)
				return
			}
			for took := int64(time.Since(began)); ; {
				slowest := l.slowest.Load()
				if took <= slowest || l.slowest.CompareAndSwap(slowest, took) {
					break
				}
			}
			l.acknowledged.Add(1)
		}
	})
}

// directBuffer is memory at a page boundary.
func directBuffer(t testing.TB, size int) []byte {
	t.Helper()
	buffer, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Munmap(buffer) })
	return buffer
}

// writeOwn writes a run of blocks of one writer, now and then zeroes, and now and then flushes.
func (l *blockLog) writeOwn(file *os.File, writer int, random *rand.Rand, buffer []byte) error {
	run := 1 + random.Intn(longestRun)
	first := writer*writerBlocks + random.Intn(writerBlocks-run)
	number := 1 + random.Int63n(1<<62)
	at := l.offset + int64(first)*logBlock
	switch random.Intn(16) {
	case 0:
		number = -number
		if err := syscall.Fallocate(int(file.Fd()), punchHole|keepSize, at, int64(run)*logBlock); err != nil {
			return fmt.Errorf("write zeroes at block %d: %w", first, err)
		}
	case 1:
		if err := file.Sync(); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
		return nil
	default:
		for n := range run {
			fillBlock(buffer[n*logBlock:(n+1)*logBlock], first+n, number)
		}
		if _, err := file.WriteAt(buffer[:run*logBlock], at); err != nil {
			return fmt.Errorf("write block %d: %w", first, err)
		}
	}
	for n := range run {
		l.last[first+n] = number
	}
	return nil
}

// writeShared writes somewhere in the blocks that several writers share: much or little, so that a replica is still busy with one when the next comes.
func (l *blockLog) writeShared(file *os.File, random *rand.Rand, buffer []byte) error {
	run := []int{1, 2, sharedBlocks / 2, sharedBlocks}[random.Intn(4)]
	first := logBlocks + random.Intn(sharedBlocks-run+1)
	fillBlock(buffer[:run*logBlock], first, random.Int63())
	if _, err := file.WriteAt(buffer[:run*logBlock], l.offset+int64(first)*logBlock); err != nil {
		return fmt.Errorf("write shared block %d: %w", first, err)
	}
	return nil
}

// fillBlock makes the content of a block from its place and the number of the write.
func fillBlock(block []byte, place int, number int64) {
	if number <= 0 {
		clear(block)
		return
	}
	for at := 0; at < len(block); at += 16 {
		binary.LittleEndian.PutUint64(block[at:], uint64(number)+uint64(at))
		binary.LittleEndian.PutUint64(block[at+8:], uint64(place))
	}
}

// goesOn waits until more requests are acknowledged, without an error.
func (l *blockLog) goesOn(t *testing.T, requests int64) {
	t.Helper()
	wanted := l.acknowledged.Load() + requests
	eventually(t, answeredWithin, "the writers go on", func() (bool, string) {
		l.check(t)
		return l.acknowledged.Load() >= wanted, fmt.Sprintf("%d of %d requests", l.acknowledged.Load(), wanted)
	})
}

// check fails the test when a writer saw an error.
func (l *blockLog) check(t *testing.T) {
	t.Helper()
	if err := l.err.Load(); err != nil {
		t.Fatalf("a writer saw an I/O error: %v", *err)
	}
}

// halt lets every writer finish its request.
func (l *blockLog) halt(t *testing.T) {
	t.Helper()
	select {
	case <-l.stop:
		return
	default:
		close(l.stop)
	}
	select {
	case <-l.ended:
	case <-time.After(answeredWithin):
		t.Errorf("a writer's request is not answered within %s", answeredWithin)
	}
}

// verify compares what a file or device holds with what was acknowledged; call it after halt.
func (l *blockLog) verify(t *testing.T, path string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const step = 256
	buffer, want := directBuffer(t, step*logBlock), make([]byte, logBlock)
	written, wrong := 0, []string{}
	for first := 0; first < logBlocks; first += step {
		if _, err := file.ReadAt(buffer, l.offset+int64(first)*logBlock); err != nil {
			t.Fatalf("read %s at block %d: %v", path, first, err)
		}
		for n := range step {
			place, got := first+n, buffer[n*logBlock:(n+1)*logBlock]
			if l.last[place] == 0 {
				continue
			}
			written++
			fillBlock(want, place, l.last[place])
			if !bytes.Equal(got, want) {
				wrong = append(wrong, fmt.Sprintf("block %d holds %x…, acknowledged was %x…", place, got[:16], want[:16]))
			}
		}
	}
	if written == 0 {
		t.Error("no block was acknowledged, so nothing is shown")
	}
	if len(wrong) > 0 {
		t.Errorf("%d of %d acknowledged blocks of %s are not there, such as %s", len(wrong), written, path, wrong[0])
	}
}
