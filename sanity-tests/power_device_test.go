package sanitytests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"
)

// Disks whose every write and flush is logged in order, with its data, in one log for all of them.
// Each is a file served through FUSE by a process of its own; a loop device over it makes the disk, and hands barriers down as fsync.

// A record of the log: where it stands in the file, what was done, and where its data begins.
type logRecord struct {
	end    int64 // of the record in the log: a position that a cut can have
	device int
	op     byte
	offset int64
	length int64
	data   int64
}

const (
	opWrite byte = iota
	opZero
	opFlush
	recordHeader = 24
)

// devicesEnv says to TestPowerDevices what to serve: a directory with `devN` files; mounts go on `diskN`, the log is `log`.
const devicesEnv = "POWER_CUT_DEVICES"

// TestPowerDevices is the process that serves the disks of TestWhatWasReadySurvivesALossOfPower; alone it does nothing.
func TestPowerDevices(t *testing.T) {
	dir := os.Getenv(devicesEnv)
	if dir == "" {
		t.Skip("a part of TestWhatWasReadySurvivesALossOfPower")
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "dev*"))
	var order sync.Mutex
	var served sync.WaitGroup
	for n := range files {
		file, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf("dev%d", n)), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		info, err := file.Stat()
		if err != nil {
			t.Fatal(err)
		}
		fuse, err := syscall.Open("/dev/fuse", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		options := fmt.Sprintf("fd=%d,rootmode=100000,user_id=0,group_id=0,allow_other", fuse)
		if err := syscall.Mount("power-cut", filepath.Join(dir, fmt.Sprintf("disk%d", n)), "fuse", 0, options); err != nil {
			t.Fatal(err)
		}
		device := &loggedDevice{number: n, fuse: fuse, file: file, size: info.Size(), log: log, order: &order}
		served.Go(func() {
			if err := device.serve(); err != nil {
				fmt.Fprintf(os.Stderr, "device %d: %v\n", device.number, err)
			}
		})
	}
	served.Wait()
}

// loggedDevice is one FUSE connection whose root is the disk, a regular file.
type loggedDevice struct {
	number, fuse int
	file         *os.File
	size         int64
	log          *os.File
	order        *sync.Mutex
}

const fuseHeader = 40

// serve answers until the disk is unmounted. One request at a time: what the log says first was done first.
func (d *loggedDevice) serve() error {
	request, reply := make([]byte, mib+8192), make([]byte, mib+16)
	for {
		n, err := syscall.Read(d.fuse, request)
		switch {
		case errors.Is(err, syscall.ENODEV):
			return nil
		case errors.Is(err, syscall.EINTR), errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EAGAIN):
			continue
		case err != nil:
			return err
		}
		body, errno := d.answer(request[:n], reply[16:])
		if body < 0 {
			continue
		}
		binary.NativeEndian.PutUint32(reply, uint32(16+body))
		binary.NativeEndian.PutUint32(reply[4:], uint32(-int32(errno)))
		copy(reply[8:16], request[8:16])
		if _, err := syscall.Write(d.fuse, reply[:16+body]); err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
}

// answer does what a request asks and returns the length of the reply's body, negative when none is expected.
func (d *loggedDevice) answer(request, body []byte) (int, syscall.Errno) {
	const (
		getattr, setattr, open, read, write, statfs, release, fsync = 3, 4, 14, 15, 16, 17, 18, 20
		flush, initialize, fallocate                                = 25, 26, 43
		forget, interrupt, batchForget                              = 2, 36, 42
	)
	u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(request[at:]) }
	i64 := func(at int) int64 { return int64(binary.NativeEndian.Uint64(request[at:])) }
	put32 := func(at int, value uint32) { binary.NativeEndian.PutUint32(body[at:], value) }
	switch u32(4) {
	case forget, batchForget, interrupt:
		return -1, 0
	case initialize:
		clear(body[:64])
		put32(0, 7)
		put32(4, 31)
		put32(8, mib)
		const asyncRead, bigWrites, asyncDirect, maxPages = 1, 1 << 5, 1 << 15, 1 << 22
		put32(12, u32(fuseHeader+12)&(asyncRead|bigWrites|asyncDirect|maxPages))
		put32(16, 64|48<<16)
		put32(20, mib)
		put32(24, 1)
		put32(28, mib/4096)
		return 64, 0
	case getattr, setattr:
		clear(body[:104])
		binary.NativeEndian.PutUint64(body, 3600)
		binary.NativeEndian.PutUint64(body[16:], 1)
		binary.NativeEndian.PutUint64(body[24:], uint64(d.size))
		binary.NativeEndian.PutUint64(body[32:], uint64(d.size/512))
		put32(76, syscall.S_IFREG|0o600)
		put32(80, 1)
		put32(96, 4096)
		return 104, 0
	case open:
		clear(body[:16])
		put32(8, 1) // past the page cache
		return 16, 0
	case statfs:
		clear(body[:80])
		binary.NativeEndian.PutUint64(body, uint64(d.size/4096))
		put32(40, 4096)
		put32(44, 255)
		put32(48, 4096)
		return 80, 0
	case release, flush:
		return 0, 0
	case read:
		n, err := d.file.ReadAt(body[:min(int64(u32(56)), d.size-i64(48))], i64(48))
		if err != nil {
			return 0, syscall.EIO
		}
		return n, 0
	case write:
		length := int64(u32(56))
		data := request[80 : 80+length]
		if d.append(opWrite, i64(48), length, data) != nil {
			return 0, syscall.EIO
		}
		if _, err := d.file.WriteAt(data, i64(48)); err != nil {
			return 0, syscall.EIO
		}
		clear(body[:8])
		put32(0, uint32(length))
		return 8, 0
	case fsync:
		if d.append(opFlush, 0, 0, nil) != nil {
			return 0, syscall.EIO
		}
		return 0, 0
	case fallocate:
		const punch, zero = 2, 0x10
		if u32(64)&(punch|zero) == 0 {
			return 0, syscall.EOPNOTSUPP
		}
		if d.append(opZero, i64(48), i64(56), nil) != nil || zeroRange(d.file, i64(48), i64(56)) != nil {
			return 0, syscall.EIO
		}
		return 0, 0
	}
	return 0, syscall.ENOSYS
}

func (d *loggedDevice) append(op byte, offset, length int64, data []byte) error {
	record := make([]byte, recordHeader, recordHeader+len(data))
	record[0], record[1] = byte(d.number), op
	binary.LittleEndian.PutUint64(record[8:], uint64(offset))
	binary.LittleEndian.PutUint64(record[16:], uint64(length))
	d.order.Lock()
	defer d.order.Unlock()
	_, err := d.log.Write(append(record, data...))
	return err
}

func zeroRange(file *os.File, offset, length int64) error {
	const keepSize, punchHole = 1, 2
	return syscall.Fallocate(int(file.Fd()), keepSize|punchHole, offset, length)
}

// readLog lists the records of a log.
func readLog(t testing.TB, log *os.File) (records []logRecord) {
	t.Helper()
	info, err := log.Stat()
	if err != nil {
		t.Fatal(err)
	}
	header := make([]byte, recordHeader)
	for at := int64(0); at < info.Size(); {
		if _, err := log.ReadAt(header, at); err != nil {
			t.Fatalf("the log of the disks is cut at %d: %v", at, err)
		}
		r := logRecord{
			device: int(header[0]), op: header[1], data: at + recordHeader,
			offset: int64(binary.LittleEndian.Uint64(header[8:])), length: int64(binary.LittleEndian.Uint64(header[16:])),
		}
		at = r.data
		if r.op == opWrite {
			at += r.length
		}
		r.end = at
		records = append(records, r)
	}
	return records
}

// apply repeats a part of a record: `from` and `to` count within it.
func (r logRecord) apply(log, disk *os.File, from, to int64) error {
	if r.op == opZero {
		return zeroRange(disk, r.offset+from, to-from)
	}
	data := make([]byte, to-from)
	if _, err := log.ReadAt(data, r.data+from); err != nil {
		return err
	}
	_, err := disk.WriteAt(data, r.offset+from)
	return err
}

// copySparse copies the data of a file and leaves its holes.
func copySparse(from *os.File, path string) error {
	const seekData, seekHole = 3, 4
	to, err := os.Create(path)
	if err != nil {
		return err
	}
	defer to.Close()
	info, err := from.Stat()
	if err != nil {
		return err
	}
	if err := to.Truncate(info.Size()); err != nil {
		return err
	}
	buffer := make([]byte, mib)
	for at := int64(0); ; {
		start, err := from.Seek(at, seekData)
		if errors.Is(err, syscall.ENXIO) {
			return nil
		} else if err != nil {
			return err
		}
		if at, err = from.Seek(start, seekHole); err != nil {
			return err
		}
		for start < at {
			part := buffer[:min(int64(len(buffer)), at-start)]
			if _, err := from.ReadAt(part, start); err != nil {
				return err
			}
			if !bytes.Equal(part, make([]byte, len(part))) {
				if _, err := to.WriteAt(part, start); err != nil {
					return err
				}
			}
			start += int64(len(part))
		}
	}
}

// attachLoop makes a block device of a file; it goes with its last user.
func attachLoop(t testing.TB, file string) (device string) {
	t.Helper()
	return strings.TrimSpace(must(t, "losetup", "--find", "--show", "--direct-io=on", file))
}

// mountDisk mounts a file that holds a filesystem.
func mountDisk(t testing.TB, file, point string) {
	t.Helper()
	device := attachLoop(t, file)
	if err := os.MkdirAll(point, 0o755); err != nil {
		t.Fatal(err)
	}
	// The filesystem says itself which one it is.
	kind, options := strings.TrimSpace(must(t, "blkid", "-o", "value", "-s", "TYPE", "-p", device)), ""
	if kind == "xfs" {
		options = "nouuid" // The same filesystem after another cut may be mounted too.
	}
	err := syscall.Mount(device, point, kind, 0, options)
	// Taken away by the kernel as soon as it is unmounted.
	must(t, "losetup", "-d", device)
	if err != nil {
		t.Fatalf("cannot mount %s (%s): %v", device, file, err)
	}
}

// loopbackUp brings up the loopback interface of a new network namespace.
func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	var request [40]byte
	copy(request[:], "lo")
	binary.NativeEndian.PutUint16(request[16:], syscall.IFF_UP|syscall.IFF_RUNNING)
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return errno
	}
	return nil
}
