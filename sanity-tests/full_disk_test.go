package sanitytests

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// smallDisk adds a disk of 8 MiB to node-1 and returns its directory.
func smallDisk(t *testing.T, i *instance) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "backing-image-small-")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		os.Remove(dir)
		t.Fatalf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		syscall.Unmount(dir, syscall.MNT_DETACH)
		os.Remove(dir)
	})
	i.apply(t, nodeYAML("disk-1", i.disk(1), false)+diskYAML("small", dir, true))
	eventually(t, 30*time.Second, "the small disk is ready", func() (bool, string) {
		_, err := os.Stat(filepath.Join(dir, "longhorn-disk.cfg"))
		return err == nil, fmt.Sprint(err)
	})
	return dir
}

func nodeYAML(disk, path string, schedulable bool) string {
	return "apiVersion: longhorn.io/v1beta2\nkind: Node\nmetadata:\n  name: node-1\n  namespace: longhorn-system\nspec:\n  disks:\n" +
		diskYAML(disk, path, schedulable)
}

func diskYAML(disk, path string, schedulable bool) string {
	return fmt.Sprintf("    %s:\n      path: %s\n      allowScheduling: %v\n", disk, path, schedulable)
}

// filesOf lists what lies of an image on a disk.
func filesOf(disk, image string) []string {
	found, _ := filepath.Glob(filepath.Join(disk, "tmp", image+"-*"))
	copies, _ := filepath.Glob(filepath.Join(disk, "backing-images", image+"-*", "*"))
	return append(found, copies...)
}

// A disk without room takes no image, keeps nothing of it, and says so; another disk is tried as soon as there is one.
func TestFullDiskSaysSoAndAnotherIsTried(t *testing.T) {
	i := ownInstance(t, 1)
	image := ext4Image(t, 16)
	raw := filepath.Join(t.TempDir(), "random.raw")
	if err := os.WriteFile(raw, randomBytes(77, 12*mib), 0o644); err != nil {
		t.Fatal(err)
	}
	small := smallDisk(t, i)
	uuid := diskUUID(t, small)
	url := serve(t, image.path, raw)
	i.apply(t, imageYAML("wide", url+"/random.raw", "", 1))
	object := until(t, i, 30*time.Second, "backingimage", "wide", "has no disk with room", func(o imageObject) bool {
		ready := conditionOf(o.Status.Conditions, "Ready")
		return ready.Reason == "NoEligibleDisk" && says(ready.Message, []string{"bytes free, the file needs"})
	})
	if hint := conditionOf(object.Status.Conditions, "Ready").Hint; !says(hint, []string{"add a disk"}) {
		t.Errorf("hint `%s`", hint)
	}
	mentions(t, "why", i.why("backingimage", "wide"), "bytes free, the file needs", "no other disk can take the first copy", "You can:")
	eventually(t, 10*time.Second, "nothing of it is on the small disk", func() (bool, string) {
		found := filesOf(small, "wide")
		return len(found) == 0, fmt.Sprint(found)
	})

	i.apply(t, nodeYAML("disk-1", i.disk(1), true))
	sum := untilImageReady(t, i, "wide").Status.Checksum
	if sum != checksumOf(t, raw) {
		t.Errorf("checksum %s", sum)
	}
	if found := filesOf(small, "wide"); len(found) > 0 {
		t.Errorf("on the small disk there is %v", found)
	}

	// A further copy where there is no room for it.
	i.apply(t, imageYAML("wide", url+"/random.raw", "", 1)+fmt.Sprintf("  diskFileSpecMap:\n    %s: {}\n", uuid))
	object = until(t, i, 30*time.Second, "backingimage", "wide", "says why there is no further copy", func(o imageObject) bool {
		file := o.Status.DiskFileStatusMap[uuid]
		return file.State == "failed" && file.ErrorKind == "Exhausted" && says(file.Message, []string{"bytes free, the file needs"})
	})
	if conditionOf(object.Status.Conditions, "Ready").Status != "True" {
		t.Errorf("the copy that there is does not count: %+v", object.Status)
	}
	mentions(t, "why", i.why("backingimage", "wide"), "`small` of `node-1`", "bytes free, the file needs", "next attempt")
	eventually(t, 10*time.Second, "nothing of it is on the small disk", func() (bool, string) {
		found := filesOf(small, "wide")
		return len(found) == 0, fmt.Sprint(found)
	})
}
