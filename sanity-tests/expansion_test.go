package sanitytests

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sizedClaim is what a claim asks for and has.
type sizedClaim struct {
	Spec struct {
		Resources struct {
			Requests map[string]string `json:"requests"`
		} `json:"resources"`
	} `json:"spec"`
	Status struct {
		Capacity   map[string]string `json:"capacity"`
		Conditions []condition       `json:"conditions"`
	} `json:"status"`
}

// grownClaim waits until a claim has a size and nothing more is to be done.
func grownClaim(t *testing.T, i *instance, name, size string) {
	t.Helper()
	until(t, i, 20*time.Second, "pvc", name, "has "+size, func(c sizedClaim) bool {
		return c.Status.Capacity["storage"] == size && len(c.Status.Conditions) == 0
	})
}

func filesystemBytes(t *testing.T, path string) int64 {
	t.Helper()
	var stats syscall.Statfs_t
	if err := syscall.Statfs(path, &stats); err != nil {
		t.Fatal(err)
	}
	return int64(stats.Blocks) * stats.Bsize
}

// A claim that is edited to be larger says what it waits for while it is used, and has its new size with all of its old bytes at the next use.
func TestExpandedClaimKeepsItsBytes(t *testing.T) {
	i := sharedInstance(t)
	watchReasons(t, i)
	image := ext4Image(t, 64)
	volume := newClaim(t, i, "growing", image, 96, 3, "Filesystem")
	path := i.mountPoint(t)
	i.cli(t, "volume", "mount", "growing", "--node", "node-1", path)
	written := randomBytes(11, 5*mib+7)
	writeSynced(t, filepath.Join(path, "old.bin"), written)

	_, stderr, code := i.run("", "volume", "expand", "growing", "--size", "192Mi")
	if code != 5 {
		t.Errorf("expanded while it is mounted: exit code %d", code)
	}
	mentions(t, "what expand says of a mounted volume", stderr, "attached to node `node-1`", "once it is detached", "the wish stays")
	mentions(t, "why the claim waits", i.why("pvc", "growing"), "asks for 192Mi and has 96Mi", "attached to node `node-1`")
	if now := filesystemBytes(t, path); now > 96*mib {
		t.Errorf("it has %d bytes while it is mounted", now)
	}
	i.cli(t, "volume", "unmount", "growing", "--node", "node-1", path)
	i.cli(t, "volume", "detach", "growing")
	until(t, i, 20*time.Second, "pvc", "growing", "waits for its filesystem", func(c sizedClaim) bool {
		return conditionOf(c.Status.Conditions, "FileSystemResizePending").Status == "True"
	})

	for n, size := range []int64{192, 320} {
		if n > 0 {
			said := i.cli(t, "volume", "expand", "growing", "--size", "320Mi")
			mentions(t, "what expand says of a detached volume", said, "expanded to 320Mi", "mounted the next time")
		}
		i.cli(t, "volume", "mount", "growing", "--node", "node-2", path)
		if now := filesystemBytes(t, path); now < size*mib*8/10 {
			t.Errorf("the filesystem has %d bytes of %d MiB", now, size)
		}
		image.verify(t, path)
		if content, err := os.ReadFile(filepath.Join(path, "old.bin")); err != nil || !bytes.Equal(content, written) {
			t.Errorf("what was written before is not there after the growth to %d MiB: %d bytes, %v", size, len(content), err)
		}
		grownClaim(t, i, "growing", map[int64]string{192: "192Mi", 320: "320Mi"}[size])
		untilRobust(t, i, volume, "healthy")
		i.cli(t, "volume", "unmount", "growing", "--node", "node-2", path)
		i.cli(t, "volume", "detach", "growing")
		untilState(t, i, volume, "detached")
	}
	replicasAreEqual(t, i, replicasOf(t, i, volume), get[imageObject](t, i, "backingimage", "growing"))
	_, stderr, code = i.run("", "volume", "expand", "growing", "--size", "192Mi")
	if code != 5 || !strings.Contains(stderr, "field can not be less than status.capacity") {
		t.Errorf("made smaller: exit code %d, %s", code, stderr)
	}
	_, stderr, code = i.run("", "volume", "expand", "growing", "--size", "4Ei")
	if code != 2 || !strings.Contains(stderr, "the largest volume has") {
		t.Errorf("made larger than any volume: exit code %d, %s", code, stderr)
	}
}

// A block volume has zeroes in what is new.
func TestExpandedBlockVolumeEndsInZeroes(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	volume := newClaim(t, i, "growing-block", image, 32, 2, "Block")
	path := filepath.Join(i.mountPoint(t), "device")
	i.cli(t, "volume", "mount", "growing-block", "--node", "node-1", path)
	writeDevice(t, path, randomBytes(12, mib), 31*mib)
	before := readAll(t, path)
	i.cli(t, "volume", "unmount", "growing-block", "--node", "node-1", path)
	i.cli(t, "volume", "detach", "growing-block")
	untilState(t, i, volume, "detached")
	i.cli(t, "volume", "expand", "growing-block", "--size", "64Mi")
	i.cli(t, "volume", "mount", "growing-block", "--node", "node-3", path)
	after := readAll(t, path)
	if len(after) != 64*mib || !bytes.Equal(after[:32*mib], before) || !bytes.Equal(after[32*mib:], make([]byte, 32*mib)) {
		t.Errorf("the device (%d bytes) is not what it was, followed by zeroes", len(after))
	}
	grownClaim(t, i, "growing-block", "64Mi")
	i.cli(t, "volume", "unmount", "growing-block", "--node", "node-3", path)
	i.cli(t, "volume", "detach", "growing-block")
}

// A class that does not allow it refuses the edit, in the words of Kubernetes.
func TestClaimOfAFixedClassIsNotExpanded(t *testing.T) {
	i := sharedInstance(t)
	class := "kind: StorageClass\napiVersion: storage.k8s.io/v1\nmetadata:\n  name: fixed\nprovisioner: driver.longhorn.io\nparameters:\n  numberOfReplicas: \"1\"\n"
	i.apply(t, class)
	i.apply(t, claimYAML("fixed", "fixed", 32, "Filesystem"))
	t.Cleanup(func() {
		i.explain(t)
		i.cli(t, "delete", "pvc", "fixed")
		i.cli(t, "delete", "storageclass", "fixed")
	})
	volume := volumeOf(t, i, "fixed")
	_, stderr, code := i.run("", "volume", "expand", "fixed", "--size", "64Mi")
	if code != 5 || !strings.Contains(stderr, "the storageclass that provisions the pvc must support resize") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	if c := get[sizedClaim](t, i, "pvc", "fixed"); c.Spec.Resources.Requests["storage"] != "32Mi" {
		t.Errorf("volume %s: the claim was changed: %+v", volume, c.Spec)
	}
}
