package sanitytests

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"
)

// nbdClient speaks to one NBD export and sends what it is told to: unlike QEMU's tools it never flushes by itself.
type nbdClient struct{ net.Conn }

const (
	nbdRead  = 0
	nbdWrite = 1
	nbdFlush = 3
)

// dialNBD opens an export over TCP.
func dialNBD(t testing.TB, address, export string) nbdClient {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	// Magic numbers and flags, then ours: fixed newstyle without padding, and the option to open an export by name.
	greeting := make([]byte, 18)
	if _, err := io.ReadFull(conn, greeting); err != nil {
		t.Fatal(err)
	}
	hello := binary.BigEndian.AppendUint32(nil, 3)
	hello = append(hello, "IHAVEOPT"...)
	hello = binary.BigEndian.AppendUint32(hello, 1)
	hello = binary.BigEndian.AppendUint32(hello, uint32(len(export)))
	if _, err := conn.Write(append(hello, export...)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 10)); err != nil {
		t.Fatalf("export `%s` on %s: %v", export, address, err)
	}
	return nbdClient{conn}
}

// do sends one request and waits for its answer.
func (c nbdClient) do(command uint16, offset int64, data []byte) error {
	request := binary.BigEndian.AppendUint32(nil, 0x25609513)
	request = binary.BigEndian.AppendUint16(request, 0)
	request = binary.BigEndian.AppendUint16(request, command)
	request = binary.BigEndian.AppendUint64(request, 0)
	request = binary.BigEndian.AppendUint64(request, uint64(offset))
	request = binary.BigEndian.AppendUint32(request, uint32(len(data)))
	if command == nbdWrite {
		request = append(request, data...)
	}
	if _, err := c.Write(request); err != nil {
		return err
	}
	reply := make([]byte, 16)
	if _, err := io.ReadFull(c, reply); err != nil {
		return err
	}
	if code := binary.BigEndian.Uint32(reply[4:]); code != 0 {
		return fmt.Errorf("the server answers error %d", code)
	}
	if command == nbdRead {
		_, err := io.ReadFull(c, data)
		return err
	}
	return nil
}
