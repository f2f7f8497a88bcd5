package sanitytests

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// enginePid is the engine process of a volume, which is the child of its holder; 0 when there is none.
func enginePid(i *instance, volume string) int {
	for _, p := range processesOf(i.dir) {
		if len(p.args) > 1 && p.args[1] == "engine" && strings.Contains(strings.Join(p.args, " "), volume+"-e-0/") {
			return p.pid
		}
	}
	return 0
}

func untilEngine(t *testing.T, i *instance, volume string, old int) int {
	t.Helper()
	pid := 0
	eventually(t, 60*time.Second, "another engine runs", func() (bool, string) {
		pid = enginePid(i, volume)
		return pid != 0 && pid != old, fmt.Sprintf("engine %d", pid)
	})
	return pid
}

func untilWhy(t *testing.T, i *instance, volume string, within time.Duration, parts ...string) {
	t.Helper()
	eventually(t, within, fmt.Sprintf("why mentions %q", parts), func() (bool, string) {
		text := i.why("volume", volume)
		for _, part := range parts {
			if !strings.Contains(strings.ToLower(text), strings.ToLower(part)) {
				return false, text
			}
		}
		return true, text
	})
}

// mountedVolume is a claim that is mounted on node-1, with a writer on it.
func mountedVolume(t *testing.T, i *instance, claim string, replicas int) (volume, mount string, w *writer, image imageFile) {
	t.Helper()
	image = ext4Image(t, 16)
	volume = newClaim(t, i, claim, image, 48, replicas, "Filesystem")
	mount = i.mountPoint(t)
	t.Cleanup(func() { i.run("", "volume", "unmount", claim, "--node", "node-1", mount) })
	i.cli(t, "volume", "mount", claim, "--node", "node-1", mount)
	untilRobust(t, i, volume, "healthy")
	w = startWriter(t, mount+"/records")
	w.goesOn(t, 50)
	return volume, mount, w, image
}

// An engine that is stopped, not dead, is told within seconds and replaced; its users only wait.
func TestSilentEngineIsToldAndReplaced(t *testing.T) {
	i := ownInstance(t, 2, "--engine-silence-limit", "6s")
	volume, _, w, _ := mountedVolume(t, i, "silent", 2)
	pid := enginePid(i, volume)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	untilWhy(t, i, volume, 8*time.Second, "does not answer", fmt.Sprint(pid), "I/O waits", "replaced")
	t.Logf("told after %s", time.Since(stopped))
	untilEngine(t, i, volume, pid)
	w.goesOn(t, 100)
	eventually(t, 20*time.Second, "nothing is said any more", func() (bool, string) {
		text := i.why("volume", volume)
		return !strings.Contains(text, "I/O waits") && strings.Contains(text, "healthy"), text
	})
	w.finish(t)
}

// installed is an instance of a binary of its own, which a test can replace.
func installed(t *testing.T, nodes int, flags ...string) *instance {
	t.Helper()
	program, err := programUnderTest()
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.TempDir(), "backing-image-csi")
	install(t, program, own)
	i, err := startInstanceOf(own, nodes, flags...)
	if err != nil {
		t.Fatalf("cannot start an instance: %v", err)
	}
	i.endWith(t)
	return i
}

// install replaces a program as a package manager does: by rename.
func install(t *testing.T, from, to string) {
	t.Helper()
	source, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	target, err := os.OpenFile(to+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(target, source); err != nil {
		t.Fatal(err)
	}
	if err := target.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(to+".new", to); err != nil {
		t.Fatal(err)
	}
}

// volume upgrade-engine replaces the engine by the installed program under a writer, and says what it did or why not.
func TestUpgradedEngineGoesOnUnderItsWriter(t *testing.T) {
	i := installed(t, 2)
	volume, _, w, _ := mountedVolume(t, i, "upgraded", 2)
	pid := enginePid(i, volume)
	version := get[engineObject](t, i, "engine", volume+"-e-0").Status.Version

	mentions(t, "the answer", i.cli(t, "volume", "upgrade-engine", "upgraded"), "already", fmt.Sprint(pid), version)
	if now := enginePid(i, volume); now != pid {
		t.Errorf("engine %d was replaced by %d for nothing", pid, now)
	}

	// One that does not start is refused before anything is disturbed.
	program, _ := programUnderTest()
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, []byte("#!/bin/sh\necho no such library >&2\nexit 127\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cli := i.binary
	i.binary = program
	install(t, broken, cli)
	_, stderr, code := i.run("", "volume", "upgrade-engine", "upgraded")
	if code != 5 {
		t.Errorf("want exit code 5, got %d: %s", code, stderr)
	}
	mentions(t, "the refusal", stderr, "no such library", "the running engine stays")
	if now := enginePid(i, volume); now != pid {
		t.Errorf("engine %d was replaced by %d", pid, now)
	}
	w.goesOn(t, 50)

	install(t, program, cli)
	said := i.cli(t, "volume", "upgrade-engine", "upgraded")
	next := untilEngine(t, i, volume, pid)
	mentions(t, "the answer", said, "node-1", fmt.Sprintf("version %s (process %d)", version, pid), fmt.Sprintf("version %s (process %d)", version, next))
	w.goesOn(t, 100)
	running, err := os.Stat(fmt.Sprintf("/proc/%d/exe", next))
	if err != nil {
		t.Fatal(err)
	}
	wanted, err := os.Stat(cli)
	if err != nil || !os.SameFile(running, wanted) {
		t.Errorf("engine %d is not of the installed program", next)
	}
	untilRobust(t, i, volume, "healthy")

	// A program that vanishes is no reason to lose a volume: the holder keeps its own.
	if err := os.Remove(cli); err != nil {
		t.Fatal(err)
	}
	killProcess(t, next)
	untilEngine(t, i, volume, next)
	w.goesOn(t, 100)
	w.finish(t)
	install(t, program, cli)
}

func TestDetachedVolumeHasNoEngineToUpgrade(t *testing.T) {
	i := sharedInstance(t)
	volume := newClaim(t, i, "not-upgraded", ext4Image(t, 16), 32, 1, "Filesystem")
	_, stderr, code := i.run("", "volume", "upgrade-engine", "not-upgraded")
	if code != 5 {
		t.Errorf("want exit code 5, got %d: %s", code, stderr)
	}
	mentions(t, "the refusal", stderr, volume, "not attached", "next attachment")
	if _, stderr, code := i.run("", "volume", "upgrade-engine", "no-such-volume"); code != 3 {
		t.Errorf("want exit code 3, got %d: %s", code, stderr)
	}
}

// Without an engine for too long the device fails, the volume says so, and nothing acknowledged is lost.
func TestEngineThatCannotStartAgainIsGivenUpInTime(t *testing.T) {
	i := ownInstance(t, 2, "--engine-limit", "10s")
	volume, mount, w, image := mountedVolume(t, i, "given-up", 2)
	w.finish(t)
	replicas := replicasOf(t, i, volume)
	// Stopped first, so that it does not drop them before it dies.
	pid := enginePid(i, volume)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for _, r := range replicas {
		killStorageDaemon(t, r)
	}
	killProcess(t, pid)
	untilWhy(t, i, volume, 20*time.Second, "its holder is starting a new engine", "given up at")
	lost(t, i, "given-up", volume, mount, w, image, "no engine came to serve", "within 10000 ms")
}

// Where engines are not replaced, as on a kernel before 6.9, the end of one is the end of its device, at once.
func TestEngineThatIsNotReplacedFailsItsDeviceAtOnce(t *testing.T) {
	i := ownInstance(t, 2, "--no-engine-replacement")
	mentions(t, "why node", i.why("node", "node-1"), "not replaced under their users", "unmount its volume and mount it again")
	volume, mount, w, image := mountedVolume(t, i, "unreplaced", 2)
	w.finish(t)
	killProcess(t, enginePid(i, volume))
	lost(t, i, "unreplaced", volume, mount, w, image, "is not replaced", "Linux 6.9")
}

// lost follows a volume whose device failed: faulted with the reason, and whole when it is mounted again.
func lost(t *testing.T, i *instance, claim, volume, mount string, w *writer, image imageFile, words ...string) {
	t.Helper()
	untilRobust(t, i, volume, "faulted")
	untilWhy(t, i, volume, 20*time.Second, append(words, "faulted", "requests on its device fail", "You can: unmount the volume")...)
	read := exec.Command("dd", "if="+mount+"/records", "of=/dev/null", "iflag=direct", "bs=4096", "count=1")
	if output, err := read.CombinedOutput(); err == nil {
		t.Errorf("a file of a lost volume was read: %s", output)
	}
	i.cli(t, "volume", "unmount", claim, "--node", "node-1", mount)
	untilState(t, i, volume, "attached")
	again := i.mountPoint(t)
	t.Cleanup(func() { i.run("", "volume", "unmount", claim, "--node", "node-1", again) })
	i.cli(t, "volume", "mount", claim, "--node", "node-1", again)
	image.verify(t, again)
	w.verify(t, again+"/records")
	untilRobust(t, i, volume, "healthy")
}
