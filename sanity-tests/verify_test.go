package sanitytests

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// flip changes one bit of a sealed copy as a failing disk does: its time is kept, and nobody is told of a write.
func flip(t *testing.T, path string, at int64) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	whole, err := syscall.Mmap(int(file.Fd()), 0, int(info.Size()), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	whole[at] ^= 8
	if err := errors.Join(syscall.Munmap(whole), file.Sync(), os.Chtimes(path, info.ModTime(), info.ModTime())); err != nil {
		t.Fatal(err)
	}
}

// diskLabel is NODE/DISK of a file on a disk.
func diskLabel(t *testing.T, i *instance, path string) string {
	t.Helper()
	rest, err := filepath.Rel(i.path("nodes"), path)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(rest, "/")
	return parts[0] + "/" + parts[1]
}

// Damage that no size or time shows is found when the user asks, and repaired from another copy by the bad chunk only.
func TestImageVerifyFindsAndRepairsDamage(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	i.apply(t, imageYAML("verified", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 2))
	removeImage(t, i, "verified")
	object := until(t, i, 60*time.Second, "backingimage", "verified", "has two copies", func(o imageObject) bool { return len(readyCopies(o)) == 2 })
	copies := copyPaths(i, "verified", object.Status.UUID)
	one, other := diskLabel(t, i, copies[0]), diskLabel(t, i, copies[1])

	output := i.cli(t, "image", "verify", "verified", "--timeout", "60s")
	mentions(t, "image verify", output, one+" whole", other+" whole")

	// The file is open somewhere, as a replica has it.
	open, err := os.Open(copies[0])
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	flip(t, copies[0], 2*mib+77)
	output = i.cli(t, "image", "verify", "verified", "--disk", other, "--timeout", "60s")
	if strings.Contains(output, one) {
		t.Errorf("the other disk was read, too: %s", output)
	}
	// The peer's other chunk is bad, too: whoever took more than the bad chunk from it would fail.
	flip(t, copies[1], 9*mib+5)
	output = i.cli(t, "image", "verify", "verified", "--disk", one, "--timeout", "60s")
	mentions(t, "image verify", output, one+" was damaged and is whole again", "1 of 16 chunks differed", "chunk 2", "repaired from")
	whole := make([]byte, 16*mib)
	if n, err := open.ReadAt(whole, 0); n != len(whole) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	good, _ := os.ReadFile(image.path)
	if string(whole) != string(good) || checksumOf(t, copies[0]) != image.checksum {
		t.Error("the repaired copy is not the image")
	}
	mentions(t, "why", i.why("backingimage", "verified"), "was damaged once", "chunk 2", "check that disk")
	output = i.cli(t, "image", "verify", "verified", "--timeout", "60s")
	mentions(t, "image verify", output, one+" whole", other+" was damaged and is whole again", "chunk 9")
	if got := checksumOf(t, copies[1]); got != image.checksum {
		t.Errorf("SHA-512 of the second copy is %s", got)
	}
	noTemporaryFiles(t, i, "verified")

	_, stderr, code := i.run("", "image", "verify", "verified", "--disk", "node-9/disk-1")
	if code != 3 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	mentions(t, "the error", stderr, "node-9/disk-1", one)
}

// Damage of the only copy is told, not hidden: it is not ready any more, says so, and is downloaded again after a while.
func TestDamageOfTheOnlyCopyIsTold(t *testing.T) {
	i := ownInstance(t, 1)
	image := ext4Image(t, 16)
	i.apply(t, imageYAML("alone", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 1))
	object := untilImageReady(t, i, "alone")
	path := copyPaths(i, "alone", object.Status.UUID)[0]
	flip(t, path, 3*mib)
	_, stderr, code := i.run("", "image", "verify", "alone", "--timeout", "60s")
	if code != 8 {
		t.Errorf("exit code %d, want 8: %s", code, stderr)
	}
	mentions(t, "image verify", stderr, "damaged", "1 of 16 chunks differ", "no other copy", "downloaded again")
	ready := conditionOf(get[imageObject](t, i, "backingimage", "alone").Status.Conditions, "Ready")
	if ready.Status != "False" || ready.Reason != "Recovering" || ready.NextRetryTime == "" {
		t.Errorf("%+v", ready)
	}
	mentions(t, "why", i.why("backingimage", "alone"), "1 of 16 chunks differ", "next attempt")

	i.apply(t, "apiVersion: longhorn.io/v1beta2\nkind: Setting\nmetadata:\n  name: backing-image-recovery-wait-interval\n  namespace: longhorn-system\nvalue: \"1\"\n")
	untilImageReady(t, i, "alone")
	if got := checksumOf(t, path); got != image.checksum {
		t.Errorf("SHA-512 %s", got)
	}
	noTemporaryFiles(t, i, "alone")
}

// Without being asked the same happens, only slower and later.
func TestBackgroundScrubFindsDamage(t *testing.T) {
	i := ownInstance(t, 2)
	image := ext4Image(t, 16)
	i.apply(t, imageYAML("scrubbed", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 2))
	object := until(t, i, 60*time.Second, "backingimage", "scrubbed", "has two copies", func(o imageObject) bool { return len(readyCopies(o)) == 2 })
	copies := copyPaths(i, "scrubbed", object.Status.UUID)
	flip(t, copies[0], 12*mib+1)
	// As if the last reading was in the year 2000.
	disk, _, _ := strings.Cut(copies[0], "/backing-images/")
	config := copies[0] + ".cfg"
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	agents := agentsOf(t, i, copies[0])
	if len(agents) != 1 {
		t.Fatalf("want one agent of %s: %v", disk, agents)
	}
	aged := strings.Replace(string(text), "{", `{"verifiedAt":"2000-01-01T00:00:00Z",`, 1)
	if err := os.WriteFile(config, []byte(aged), 0o644); err != nil {
		t.Fatal(err)
	}
	killProcess(t, agents[0].pid)
	repaired := until(t, i, 60*time.Second, "backingimage", "scrubbed", "was repaired", func(o imageObject) bool {
		return o.Status.DiskFileStatusMap[diskUUID(t, disk)].Damage != "" && len(readyCopies(o)) == 2
	})
	mentions(t, "the status", repaired.Status.DiskFileStatusMap[diskUUID(t, disk)].Damage, "chunk 12")
	if got := checksumOf(t, copies[0]); got != image.checksum {
		t.Errorf("SHA-512 %s", got)
	}
}
