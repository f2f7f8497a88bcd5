package sanitytests

import (
	"path/filepath"
	"testing"
	"time"
)

// An image in use is not deleted under its volumes; when the last one goes, so do its files and managers.
func TestImageInUseIsNotDeleted(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	volume := newClaim(t, i, "in-use", image, 32, 1, "Filesystem")
	untilImageReady(t, i, "in-use")

	_, stderr, code := i.run("", "delete", "backingimage", "in-use", "--timeout", "2s")
	if code == 0 {
		t.Fatal("an image was deleted while a volume uses it")
	}
	mentions(t, "the refusal", stderr, "in-use")
	if object := get[imageObject](t, i, "backingimage", "in-use"); len(readyCopies(object)) == 0 {
		t.Errorf("the image lost its copies: %+v", object.Status)
	}
	mount := i.mountPoint(t)
	i.cli(t, "volume", "mount", "in-use", "--node", "node-1", mount)
	image.verify(t, mount)
	i.cli(t, "volume", "unmount", "in-use", "--node", "node-1", mount)
	i.cli(t, "volume", "detach", "in-use")

	i.cli(t, "delete", "pvc", "in-use")
	untilGone(t, i, 20*time.Second, "volume", volume)
	if _, stderr, code := i.run("", "delete", "backingimage", "in-use"); code != 0 && code != 3 {
		t.Errorf("delete after the last volume: exit code %d: %s", code, stderr)
	}
	untilGone(t, i, 20*time.Second, "backingimage", "in-use")
	nothingLeftOf(t, i, "in-use", volume)
	if cfg, _ := filepath.Glob(i.path("nodes", "*", "*", "longhorn-disk.cfg")); len(cfg) != i.nodes {
		t.Errorf("disks lost their configuration: %v", cfg)
	}
}
