package sanitytests

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The holder dies under a mounted volume: its engine serves on. When that dies too, nobody waits: users get an error at once, the
// volume says what happened and what to do, and the next attachment has every acknowledged write.
func TestWithoutHolderAndEngineAVolumeFailsAtOnceAndIsAttachedAgain(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	const name = "unheld"
	volume := newClaim(t, i, name, image, 32, 2, "Filesystem")
	mount := i.mountPoint(t)
	t.Cleanup(func() { i.run("", "volume", "unmount", name, "--node", "node-1", mount) })
	i.cli(t, "volume", "mount", name, "--node", "node-1", mount)
	untilRobust(t, i, volume, "healthy")
	w := startWriter(t, mount+"/records")
	w.goesOn(t, 50)

	killRole(t, i, volume, "engine-holder")
	w.goesOn(t, 200)
	untilRobust(t, i, volume, "healthy")
	if ready := conditionOf(engineOf(t, i, volume).Status.Conditions, "Ready"); ready.Status != "True" {
		t.Errorf("an engine that serves without its holder is told as %+v", ready)
	}

	// It is not taken for dead when it does not answer for a while, and whoever waits is told that nobody will replace it.
	pid := enginePid(i, volume)
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	untilWhy(t, i, volume, 40*time.Second, "does not answer", "its holder is gone", "nobody replaces it", "You can: end that process by kill -9")
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	w.goesOn(t, 100)
	eventually(t, 30*time.Second, "the engine is told as serving", func() (bool, string) {
		ready := conditionOf(engineOf(t, i, volume).Status.Conditions, "Ready")
		return ready.Status == "True", fmt.Sprintf("%+v", ready)
	})
	killRole(t, i, volume, "engine")
	eventually(t, 5*time.Second, "the writer gets an error", func() (bool, string) {
		return w.err.Load() != nil, "it waits"
	})
	until(t, i, 20*time.Second, "volume", volume, "says that its engine ended and who uses the device", func(v volumeObject) bool {
		return v.Status.Robustness != "healthy" && says(conditionOf(v.Status.Conditions, "Detached").Message, []string{"in use by", mount})
	})
	mentions(t, "why", i.why("volume", volume), volume, "in use by", mount, "You can:")

	// It is still wished on node-1, so it comes back as soon as the dead device is let go.
	i.cli(t, "volume", "unmount", name, "--node", "node-1", mount)
	untilState(t, i, volume, "attached")
	untilRobust(t, i, volume, "healthy")
	i.cli(t, "volume", "mount", name, "--node", "node-1", mount)
	w.verify(t, mount+"/records")
	image.verify(t, mount)
	again := startWriter(t, mount+"/more")
	again.goesOn(t, 50)
	again.finish(t)
	i.cli(t, "volume", "unmount", name, "--node", "node-1", mount)
	i.cli(t, "volume", "detach", name)
	untilState(t, i, volume, "detached")
	replicasAreEqual(t, i, replicasOf(t, i, volume), get[imageObject](t, i, "backingimage", name))
}

// killRole kills the process of a role that works for a volume.
func killRole(t *testing.T, i *instance, volume, role string) {
	t.Helper()
	found := slices.DeleteFunc(processesOf(i.path("nodes")), func(p process) bool {
		return len(p.args) < 2 || p.args[1] != role || !strings.Contains(p.String(), volume)
	})
	if len(found) != 1 {
		t.Fatalf("want one %s of %s, found %v", role, volume, found)
	}
	killProcess(t, found[0].pid)
}
