package sanitytests

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The main job: a claim on a compressed qcow2 image, with the YAML of the documentation.
func TestClaimWithBackingImage(t *testing.T) {
	i := sharedInstance(t)
	raw := ext4Image(t, 64)
	image := raw.compressedQcow2(t)
	volume := newClaim(t, i, "main-job", image, 96, 3, "Filesystem")

	first := i.mountPoint(t)
	i.cli(t, "volume", "mount", "main-job", "--node", "node-1", first)
	image.verify(t, first)
	var stats syscall.Statfs_t
	if err := syscall.Statfs(first, &stats); err != nil {
		t.Fatal(err)
	}
	if size := int64(stats.Blocks) * stats.Bsize; size < 80*mib {
		t.Errorf("the filesystem has %d bytes; it shall be grown to the volume's 96 MiB", size)
	}
	written := randomBytes(7, 2*mib+5)
	writeSynced(t, filepath.Join(first, "written.bin"), written)
	i.cli(t, "volume", "unmount", "main-job", "--node", "node-1", first)
	i.cli(t, "volume", "detach", "main-job")
	untilState(t, i, volume, "detached")

	second := i.mountPoint(t)
	i.cli(t, "volume", "mount", "main-job", "--node", "node-2", second)
	image.verify(t, second)
	if got, err := os.ReadFile(filepath.Join(second, "written.bin")); err != nil || string(got) != string(written) {
		t.Errorf("what was written on node-1 is not there on node-2 (%d bytes, %v)", len(got), err)
	}
	if v := untilRobust(t, i, volume, "healthy"); v.Status.CurrentNodeID != "node-2" {
		t.Errorf("the volume is attached to `%s`, want node-2", v.Status.CurrentNodeID)
	}

	object := get[imageObject](t, i, "backingimage", "main-job")
	if object.Status.Checksum != image.checksum || object.Status.Format != "qcow2" || object.Status.VirtualSize != 64*mib {
		t.Errorf("the image's status does not describe the file: %+v", object.Status)
	}
	if len(object.Status.DiskFileStatusMap) != 3 {
		t.Errorf("want 3 copies: %+v", object.Status.DiskFileStatusMap)
	}
	for disk, file := range object.Status.DiskFileStatusMap {
		if file.State != "ready" {
			t.Errorf("copy on disk %s: %+v", disk, file)
		}
	}
	original, err := os.ReadFile(image.path)
	if err != nil {
		t.Fatal(err)
	}
	for node := 1; node <= 3; node++ {
		path := filepath.Join(i.disk(node), "backing-images", "main-job-"+object.Status.UUID, "backing")
		if sum := strings.Fields(must(t, "sha512sum", path))[0]; sum != image.checksum {
			t.Errorf("%s: sha512sum says %s, want %s", path, sum, image.checksum)
		}
		if copied, err := os.ReadFile(path); err != nil || string(copied) != string(original) {
			t.Errorf("%s is not the file that was served (%v)", path, err)
		}
		for _, file := range []string{"backing.cfg", "backing.chunks"} {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), file)); err != nil {
				t.Errorf("%v", err)
			}
		}
	}
	noTemporaryFiles(t, i, "main-job")

	i.cli(t, "volume", "unmount", "main-job", "--node", "node-2", second)
	i.cli(t, "volume", "detach", "main-job")
	i.cli(t, "delete", "pvc", "main-job")
	untilGone(t, i, 20*time.Second, "volume", volume)
	i.cli(t, "delete", "backingimage", "main-job")
	untilGone(t, i, 20*time.Second, "backingimage", "main-job")
	nothingLeftOf(t, i, "main-job", volume)
}

// nothingLeftOf waits until no file, object or process of an image and its volume is left.
func nothingLeftOf(t *testing.T, i *instance, image, volume string) {
	t.Helper()
	eventually(t, 20*time.Second, "nothing is left", func() (bool, string) {
		var rest []string
		for _, pattern := range []string{"backing-images/" + image + "-*", "tmp/" + image + "-*", "replicas/" + volume + "-*"} {
			found, _ := filepath.Glob(i.path("nodes", "*", "*", pattern))
			rest = append(rest, found...)
		}
		for _, kind := range []string{"replica", "engine"} {
			objects, err := tryList[object](i, kind)
			if err != nil {
				return false, err.Error()
			}
			for _, o := range objects {
				if strings.HasPrefix(o.Metadata.Name, volume) {
					rest = append(rest, kind+" "+o.Metadata.Name)
				}
			}
		}
		for _, p := range processesOf(i.dir) {
			if strings.Contains(p.String(), volume) || strings.Contains(p.String(), "backing-image-ds-"+image) {
				rest = append(rest, p.String())
			}
		}
		return len(rest) == 0, strings.Join(rest, "\n")
	})
}

// noTemporaryFiles waits until the disks hold whole copies of an image and nothing else of it.
func noTemporaryFiles(t *testing.T, i *instance, image string) {
	t.Helper()
	eventually(t, 10*time.Second, "temporary files are gone", func() (bool, string) {
		found := unfinishedFiles(i, image)
		return len(found) == 0, fmt.Sprint(found)
	})
}

// unfinishedFiles lists what lies below the disks' tmp and backing-images and is not part of a whole copy, of one image or of all (an empty name).
func unfinishedFiles(i *instance, image string) (found []string) {
	prefix := ""
	if image != "" {
		prefix = image + "-"
	}
	found, _ = filepath.Glob(i.path("nodes", "*", "disk-*", "tmp", prefix+"*"))
	copies, _ := filepath.Glob(i.path("nodes", "*", "disk-*", "backing-images", prefix+"*"))
	for _, dir := range copies {
		files, _ := filepath.Glob(filepath.Join(dir, "*"))
		if !slices.Contains(files, filepath.Join(dir, "backing")) {
			found = append(found, dir)
		}
		for _, file := range files {
			if !slices.Contains([]string{"backing", "backing.cfg", "backing.chunks"}, filepath.Base(file)) {
				found = append(found, file)
			}
		}
	}
	return found
}

// writeSynced writes a file and waits until it is on stable storage.
func writeSynced(t testing.TB, path string, content []byte) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := file.Sync(); err != nil {
		t.Fatal(err)
	}
}
