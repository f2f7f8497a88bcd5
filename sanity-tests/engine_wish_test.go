package sanitytests

import (
	"encoding/json"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"
)

// An instance that comes back finds an engine that lives and serves other replicas than the wish says: it disturbs nobody who
// uses the device, it never passes for the attachment that is wished, and it makes room when its users are gone.
func TestEngineOfAnotherAttachmentIsNeverTakenForThisOne(t *testing.T) {
	i := ownInstance(t, 2)
	volume, mount, w, image := mountedVolume(t, i, "other", 2)
	pid := enginePid(i, volume)
	i.kill(t)
	config := i.path("nodes/node-1/instance/engines", volume+"-e-0", "config.json")
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	var wish map[string]any
	if err := json.Unmarshal(text, &wish); err != nil {
		t.Fatal(err)
	}
	for _, address := range wish["replicas"].(map[string]any) {
		address.(map[string]any)["tcp"] = "127.0.0.1:9"
	}
	if text, err = json.Marshal(wish); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, text, 0o644); err != nil {
		t.Fatal(err)
	}
	i.restart(t)

	untilWhy(t, i, volume, 30*time.Second, "in use by", mount, "You can:")
	if now := get[volumeObject](t, i, "volume", volume); now.Status.Robustness == "healthy" {
		t.Errorf("the volume passes for healthy: %+v", now.Status)
	}
	w.goesOn(t, 100)
	if now := enginePid(i, volume); now != pid {
		t.Errorf("engine %d was replaced by %d under its users", pid, now)
	}
	w.finish(t)
	i.cli(t, "volume", "unmount", "other", "--node", "node-1", mount)
	untilEngine(t, i, volume, pid)
	untilRobust(t, i, volume, "healthy")
	i.cli(t, "volume", "mount", "other", "--node", "node-1", mount)
	w.verify(t, mount+"/records")
	image.verify(t, mount)
	i.cli(t, "volume", "unmount", "other", "--node", "node-1", mount)
	i.cli(t, "volume", "detach", "other")
	untilState(t, i, volume, "detached")
	replicasAreEqual(t, i, replicasOf(t, i, volume), get[imageObject](t, i, "backingimage", "other"))
}

// An engine that answers and gets nowhere, here because the only replica does not answer, is told with its requests.
func TestEngineThatCompletesNothingIsTold(t *testing.T) {
	i := ownInstance(t, 1)
	volume, _, w, _ := mountedVolume(t, i, "stuck", 1)
	pid := enginePid(i, volume)
	daemon := storageDaemon(t, replicasOf(t, i, volume)[0])
	t.Cleanup(func() { _ = syscall.Kill(daemon, syscall.SIGCONT) })
	if err := syscall.Kill(daemon, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	untilWhy(t, i, volume, 25*time.Second, fmt.Sprintf("process %d", pid), "completed none of its", "I/O waits", "You can: look at the disks")
	if err := syscall.Kill(daemon, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	w.goesOn(t, 100)
	untilRobust(t, i, volume, "healthy")
	eventually(t, 20*time.Second, "nothing is said any more", func() (bool, string) {
		ready := conditionOf(get[volumeObject](t, i, "volume", volume).Status.Conditions, "Ready")
		return ready.Status == "True", fmt.Sprintf("%+v", ready)
	})
	if now := enginePid(i, volume); now != pid {
		t.Errorf("engine %d was replaced by %d although its replica came back", pid, now)
	}
	w.finish(t)
}
