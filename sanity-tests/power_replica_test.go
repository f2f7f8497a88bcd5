package sanitytests

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// One replica process alone on a logged disk: power is cut right behind its answers, before anything else of an instance can make durable what it forgot to.

func TestARecordedGenerationSurvivesALossOfPower(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			m := newMachine(t, "disk")
			testPowerLoss(t, m, []string{kind}, "TestPowerReplica", "TestPowerReplicaAfter", fromEnvironment(t, "POWER_CUTS", replicaCuts), nil)
		})
	}
}

const (
	replicaCuts  = 20
	replicaName  = "r-1"
	replicaBytes = 16 * mib
	patternBytes = 65536
	// In a network of its own.
	replicaAddress = "127.0.0.1:10000"
	// patternWritten: on the replica, the first Count patterns.
	patternWritten = "pattern was written"
)

// soloReplica is a replica process without an instance.
type soloReplica struct {
	dir     string
	control net.Conn
	lines   *bufio.Reader
	process *exec.Cmd
	ended   chan struct{}
	said    bytes.Buffer
}

func (m machine) startReplica(t *testing.T) *soloReplica {
	t.Helper()
	program, err := programUnderTest()
	if err != nil {
		t.Fatal(err)
	}
	r := &soloReplica{dir: m.replicaDir(), ended: make(chan struct{})}
	config := filepath.Join(m.Root, "replica-config.json")
	text := fmt.Sprintf(`{"volume":"v","replica":%q,"directory":%q,"sizeBytes":%d,"image":null,"listen":%q}`,
		replicaName, r.dir, replicaBytes, replicaAddress)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r.process = exec.Command(program, "replica", "--config", config)
	r.process.Stdout, r.process.Stderr = &r.said, &r.said
	if err := r.process.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.process.Wait(); close(r.ended) }()
	connected := func() (bool, string) {
		// The socket of a life before the power cut is still there.
		r.control, err = net.Dial("unix", filepath.Join(r.dir, "control.sock"))
		return err == nil, fmt.Sprint(err)
	}
	if err := waitFor(20*time.Second, r.ended, connected, func(last string) error { return errors.New(last) }); err != nil {
		t.Fatalf("the replica does not answer: %v\n%s", err, &r.said)
	}
	r.lines = bufio.NewReader(r.control)
	return r
}

func (m machine) replicaDir() string { return filepath.Join(m.Points[0], "replicas", "v-00000001") }

type replicaReply struct {
	Reply, Message, Export string
	Record                 replicaRecord
}

// tell sends a request; a refusal is an outcome.
func (r *soloReplica) tell(t *testing.T, format string, values ...any) (reply replicaReply) {
	t.Helper()
	fmt.Fprintf(r.control, format+"\n", values...)
	line, err := r.lines.ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &reply)
	}
	if err != nil {
		t.Fatalf("%s: %v %s\n%s", fmt.Sprintf(format, values...), err, line, &r.said)
	}
	return reply
}

// ask sends a request that must be granted.
func (r *soloReplica) ask(t *testing.T, format string, values ...any) replicaReply {
	t.Helper()
	reply := r.tell(t, format, values...)
	if reply.Reply == "refused" {
		t.Fatalf("%s: %s\n%s", fmt.Sprintf(format, values...), reply.Message, &r.said)
	}
	return reply
}

func (r *soloReplica) open(t *testing.T, generation int64) (export string) {
	t.Helper()
	return r.ask(t, `{"request":"open","generation":%d,"members":[%q]}`, generation, replicaName).Export
}

// write writes pattern number n, and flushes if asked to.
func (r *soloReplica) write(t *testing.T, export string, n int64, flush bool) {
	t.Helper()
	client := dialNBD(t, replicaAddress, export)
	defer client.Close()
	err := client.do(nbdWrite, patternOffset(n), pattern(n))
	if err == nil && flush {
		err = client.do(nbdFlush, 0, nil)
	}
	if err != nil {
		t.Fatalf("pattern %d: %v\n%s", n, err, &r.said)
	}
}

func pattern(n int64) []byte { return bytes.Repeat([]byte{byte(n + 1)}, patternBytes) }

// patternOffset: neighbors share clusters of 128 KiB.
func patternOffset(n int64) int64 { return n * patternBytes * 3 / 2 }

// TestPowerReplica is the process of the user; alone it does nothing.
func TestPowerReplica(t *testing.T) {
	m := thisMachine(t)
	mountDisk(t, m.path("disk0"), m.Points[0])
	p := m.newPromises()
	r := m.startReplica(t)
	record := filepath.Join(r.dir, "replica.json")
	written := int64(0)
	for n := range int64(10) {
		p.end(t, func(p promise) bool { return p.Kind == detachedClean })
		export := r.open(t, 2*n+1)
		p.made(t, replicaReached, replicaName, 2*n+1, record)
		r.write(t, export, written, true)
		written++
		p.made(t, patternWritten, replicaName, written)
		r.ask(t, `{"request":"fence","generation":%d,"members":[%q],"export":%q}`, 2*n+2, replicaName, export)
		p.made(t, replicaReached, replicaName, 2*n+2, record)
		// What nobody has flushed is safe once the replica says that the attachment has ended cleanly.
		r.write(t, export, written, false)
		written++
		r.ask(t, `{"request":"close","generation":%d}`, 2*n+2)
		p.made(t, detachedClean, replicaName, 2*n+2, record)
		p.made(t, patternWritten, replicaName, written)
	}
	p.save(t)
}

// TestPowerReplicaAfter is the machine after a cut; alone it does nothing.
func TestPowerReplicaAfter(t *testing.T) {
	m := thisMachine(t)
	mountDisk(t, m.Disks[0], m.Points[0])
	made := m.promisesAt(t)
	m.checkRecords(t, made)
	head := filepath.Join(m.replicaDir(), "volume-head.qcow2")
	if _, err := os.Stat(head); err == nil {
		// 3 means clusters that nobody uses, which cost room and nothing else.
		output, err := exec.Command("qemu-img", "check", "-f", "qcow2", head).CombinedOutput()
		if code := new(exec.ExitError); err != nil && (!errors.As(err, &code) || code.ExitCode() != 3) {
			t.Errorf("%s is damaged: %v\n%s", head, err, output)
		}
	}
	// It goes on with the next generation, and serves what was written.
	r := m.startReplica(t)
	next := int64(r.ask(t, `{"request":"status"}`).Record.Generation) + 1
	export := r.open(t, next)
	client := dialNBD(t, replicaAddress, export)
	defer client.Close()
	for _, p := range made {
		if p.Kind != patternWritten {
			continue
		}
		for n := range p.Count {
			content := make([]byte, patternBytes)
			if err := client.do(nbdRead, patternOffset(n), content); err != nil || !bytes.Equal(content, pattern(n)) {
				t.Errorf("%s: pattern %d is not there (%v)", p, n, err)
			}
		}
	}
	r.ask(t, `{"request":"close","generation":%d}`, next)
}
