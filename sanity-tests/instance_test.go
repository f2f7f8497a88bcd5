package sanitytests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	readyWithin = 30 * time.Second
	// A call of the command line may wait for an image and an attachment.
	commandWithin = time.Minute
)

// instance is one standalone daemon and its data directory.
type instance struct {
	binary string
	// root holds dir and what tests keep beside it (log, mount points).
	root, dir string
	listen    string
	nodes     int
	flags     []string
	// env is set in the daemon and in all that it starts.
	env       []string
	daemon    *exec.Cmd
	exited    chan struct{}
	conns     map[string]*grpc.ClientConn
	explained map[testing.TB]bool
	// Tests that run at the same time share an instance.
	explaining sync.Mutex
}

// startInstance starts a daemon on a new directory and waits until it is ready.
func startInstance(nodes int, flags ...string) (*instance, error) {
	program, err := programUnderTest()
	if err != nil {
		return nil, err
	}
	return startInstanceOf(program, nodes, flags...)
}

// startInstanceOf does it with another binary.
func startInstanceOf(program string, nodes int, flags ...string) (*instance, error) {
	return startInstanceIn(nil, program, nodes, flags...)
}

// startInstanceIn does it with variables of the environment.
func startInstanceIn(env []string, program string, nodes int, flags ...string) (*instance, error) {
	root, err := os.MkdirTemp("", "backing-image-")
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	listen := listener.Addr().String()
	listener.Close()
	i := &instance{
		binary: program, root: root, dir: filepath.Join(root, "data"), listen: listen, nodes: nodes, flags: flags, env: env,
		conns: map[string]*grpc.ClientConn{}, explained: map[testing.TB]bool{},
	}
	if err := i.start(); err != nil {
		i.end()
		return nil, err
	}
	return i, nil
}

// ownInstance is an instance for one test that may kill it.
func ownInstance(t *testing.T, nodes int, flags ...string) *instance {
	t.Helper()
	i, err := startInstance(nodes, flags...)
	if err != nil {
		t.Fatalf("cannot start an instance: %v", err)
	}
	i.endWith(t)
	return i
}

// endWith ends an instance with its test.
func (i *instance) endWith(t *testing.T) {
	t.Cleanup(func() {
		if err := i.end(); err != nil {
			t.Errorf("%v", err)
		}
		if !t.Failed() {
			os.RemoveAll(i.root)
		}
	})
	i.explainOnFailure(t)
}

// sharedInstance is the instance of TestMain; on failure it says how its objects do.
func sharedInstance(t *testing.T) *instance {
	t.Helper()
	sharedUsed.Store(true)
	i, err := shared()
	if err != nil {
		t.Fatalf("cannot start the instance: %v", err)
	}
	i.explainOnFailure(t)
	return i
}

// start runs the daemon and waits for DIR/ready.
func (i *instance) start() error {
	os.Remove(i.path("ready"))
	log, err := os.OpenFile(i.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := append([]string{"standalone", "--data", i.dir, "--nodes", fmt.Sprint(i.nodes), "--listen", i.listen}, i.flags...)
	i.daemon = exec.Command(i.binary, args...)
	i.daemon.Stdout, i.daemon.Stderr = log, log
	i.daemon.Env = append(os.Environ(), i.env...)
	i.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := i.daemon.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	i.exited = exited
	go func(daemon *exec.Cmd) {
		daemon.Wait()
		close(exited)
	}(i.daemon)
	ready := func() (bool, string) {
		_, err := os.Stat(i.path("ready"))
		return err == nil, "no file `ready`"
	}
	return waitFor(readyWithin, exited, ready, func(last string) error {
		return fmt.Errorf("the daemon did not become ready (%s); its log ends with:\n%s", last, tail(i.logPath(), 40))
	})
}

// kill ends the daemon without a chance to tidy up.
func (i *instance) kill(t *testing.T) {
	t.Helper()
	i.signal(t, syscall.SIGKILL)
}

// signal ends the daemon and waits until it is gone.
func (i *instance) signal(t *testing.T, signal syscall.Signal) {
	t.Helper()
	if err := i.daemon.Process.Signal(signal); err != nil {
		t.Fatalf("cannot signal the daemon: %v", err)
	}
	select {
	case <-i.exited:
	case <-time.After(readyWithin):
		t.Fatalf("the daemon did not end within %s after %s; its log ends with:\n%s", readyWithin, signal, tail(i.logPath(), 40))
	}
	i.disconnect()
}

// restart starts the daemon again on the same directory.
func (i *instance) restart(t *testing.T) {
	t.Helper()
	if err := i.start(); err != nil {
		t.Fatal(err)
	}
}

// end stops everything; it is an error when a process, mount or loop device of the directory is left.
func (i *instance) end() error {
	i.disconnect()
	ctx, cancel := context.WithTimeout(context.Background(), commandWithin)
	defer cancel()
	output, stopErr := exec.CommandContext(ctx, i.binary, "standalone", "stop", "--data", i.dir, "--all").CombinedOutput()
	if stopErr != nil {
		stopErr = fmt.Errorf("standalone stop --all: %w\n%s", stopErr, output)
	}
	if i.daemon != nil && i.daemon.Process != nil {
		select {
		case <-i.exited:
		case <-time.After(10 * time.Second):
			stopErr = errors.Join(stopErr, errors.New("the daemon outlived standalone stop --all"))
			i.daemon.Process.Kill()
		}
	}
	left := func() (bool, string) {
		rest := leftovers(i.root)
		return len(rest) == 0, strings.Join(rest, "\n")
	}
	leftErr := waitFor(10*time.Second, nil, left, func(last string) error {
		cleanUp(i.root)
		return fmt.Errorf("left after standalone stop --all:\n%s\nit said:\n%s\nthe log ends with:\n%s", last, output, tail(i.logPath(), 30))
	})
	return errors.Join(stopErr, leftErr)
}

func (i *instance) path(elements ...string) string {
	return filepath.Join(append([]string{i.dir}, elements...)...)
}

func (i *instance) logPath() string { return filepath.Join(i.root, "daemon.log") }

func (i *instance) disk(node int) string {
	return i.path("nodes", fmt.Sprintf("node-%d", node), "disk-1")
}

// run calls the command line; the exit code is an outcome, not an error.
func (i *instance) run(input string, args ...string) (stdout, stderr string, code int) {
	ctx, cancel := context.WithTimeout(context.Background(), commandWithin)
	defer cancel()
	command := exec.CommandContext(ctx, i.binary, args...)
	command.Env = append(os.Environ(), "BACKING_IMAGE_CSI_SERVER=http://"+i.listen)
	var out, err bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = strings.NewReader(input), &out, &err
	if failure := command.Run(); failure != nil && command.ProcessState == nil {
		return out.String(), failure.Error(), -1
	}
	return out.String(), err.String(), command.ProcessState.ExitCode()
}

// cli calls the command line, which must succeed.
func (i *instance) cli(t testing.TB, args ...string) string {
	t.Helper()
	stdout, stderr, code := i.run("", args...)
	if code != 0 {
		t.Fatalf("%s: exit code %d\n%s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// apply applies YAML.
func (i *instance) apply(t testing.TB, yaml string) {
	t.Helper()
	file, err := os.CreateTemp(i.root, "apply-*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file.Name())
	file.WriteString(yaml)
	file.Close()
	i.cli(t, "apply", "-f", file.Name())
}

// why explains an object in plain words.
func (i *instance) why(kind, name string) string {
	stdout, stderr, _ := i.run("", "why", kind, name)
	return stdout + stderr
}

// explainOnFailure prints, once, how every image and volume does, and the ends of the logs. What removes objects at the end of a test calls explain before.
func (i *instance) explainOnFailure(t *testing.T) {
	t.Cleanup(func() { i.explain(t) })
}

// explain does that now, when the test has failed.
func (i *instance) explain(t testing.TB) {
	i.explaining.Lock()
	defer i.explaining.Unlock()
	if !t.Failed() || i.explained[t] {
		return
	}
	i.explained[t] = true
	for _, kind := range []string{"backingimage", "volume"} {
		objects, err := tryList[object](i, kind)
		if err != nil {
			t.Logf("list %s: %v", kind, err)
		}
		for _, o := range objects {
			t.Logf("why %s %s:\n%s", kind, o.Metadata.Name, i.why(kind, o.Metadata.Name))
		}
	}
	t.Logf("the daemon's log ends with:\n%s", tail(i.logPath(), 60))
	for _, pattern := range [][]string{{"workloads", "*"}, {"nodes", "*", "instance"}, {"nodes", "*", "instance", "*"}} {
		logs, _ := filepath.Glob(i.path(append(pattern, "*log*")...))
		for _, log := range logs {
			t.Logf("%s ends with:\n%s", log, tail(log, 15))
		}
	}
}

func (i *instance) dial(t testing.TB, socket string) *grpc.ClientConn {
	t.Helper()
	if conn := i.conns[socket]; conn != nil {
		return conn
	}
	conn, err := grpc.NewClient("unix://"+i.path("csi", socket),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	i.conns[socket] = conn
	return conn
}

func (i *instance) disconnect() {
	for socket, conn := range i.conns {
		conn.Close()
		delete(i.conns, socket)
	}
}

func (i *instance) controller(t testing.TB) csi.ControllerClient {
	t.Helper()
	return csi.NewControllerClient(i.dial(t, "controller.sock"))
}

func (i *instance) node(t testing.TB, node int) csi.NodeClient {
	t.Helper()
	return csi.NewNodeClient(i.dial(t, fmt.Sprintf("node-%d.sock", node)))
}

// mountPoint is a new directory to mount on. It is not below the test's own temporary directory, because that is removed before a failed test has unmounted.
func (i *instance) mountPoint(t testing.TB) string {
	t.Helper()
	path, err := os.MkdirTemp(i.root, "mount-")
	if err != nil {
		t.Fatal(err)
	}
	return path
}
