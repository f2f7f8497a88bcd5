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
	"strings"
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
	replicaCuts  = 30
	replicaName  = "r-1"
	replicaBytes = 16 * mib
	patternBytes = 65536
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
	text := fmt.Sprintf(`{"volume":"v","replica":%q,"directory":%q,"sizeBytes":%d,"image":null,"listen":"127.0.0.1:10000"}`, replicaName, r.dir, replicaBytes)
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

func (r *soloReplica) ask(t *testing.T, format string, values ...any) (reply replicaReply) {
	t.Helper()
	fmt.Fprintf(r.control, format+"\n", values...)
	line, err := r.lines.ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &reply)
	}
	if err != nil || reply.Reply == "refused" {
		t.Fatalf("%s: %v %s\n%s", fmt.Sprintf(format, values...), err, line, &r.said)
	}
	return reply
}

func (r *soloReplica) open(t *testing.T, generation int64) (export string) {
	t.Helper()
	return r.ask(t, `{"request":"open","generation":%d,"members":[%q]}`, generation, replicaName).Export
}

// write writes pattern number n; the cache mode `unsafe` of qemu-io asks for no flush.
func (r *soloReplica) write(t *testing.T, export, cache string, n int64) {
	t.Helper()
	url := fmt.Sprintf("nbd+unix:///%s?socket=%s", export, filepath.Join(r.dir, "nbd.sock"))
	must(t, "qemu-io", "-f", "raw", "-t", cache, "-c", patternCommand("write", n), url)
}

// patternCommand: neighbors share clusters.
func patternCommand(verb string, n int64) string {
	return fmt.Sprintf("%s -P %d %d %d", verb, n+1, n*patternBytes*3/2, patternBytes)
}

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
		// The flush at the end of qemu-io is that of a user.
		r.write(t, export, "writeback", written)
		written++
		p.made(t, patternWritten, replicaName, written)
		r.ask(t, `{"request":"fence","generation":%d,"members":[%q],"export":%q}`, 2*n+2, replicaName, export)
		p.made(t, replicaReached, replicaName, 2*n+2, record)
		// What nobody has flushed is safe once the replica says that the attachment has ended cleanly.
		r.write(t, export, "unsafe", written)
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
	found := r.ask(t, `{"request":"status"}`).Record
	export := r.open(t, found.Generation+1)
	url := fmt.Sprintf("nbd+unix:///%s?socket=%s", export, filepath.Join(r.dir, "nbd.sock"))
	for _, p := range made {
		if p.Kind != patternWritten {
			continue
		}
		arguments := []string{"-r", "-f", "raw"}
		for n := range p.Count {
			arguments = append(arguments, "-c", patternCommand("read", n))
		}
		if output := must(t, "qemu-io", append(arguments, url)...); strings.Contains(output, "verification failed") || strings.Contains(output, "error") {
			t.Errorf("%s: %s", p, output)
		}
	}
	r.ask(t, `{"request":"close","generation":%d}`, found.Generation+1)
}
