package sanitytests

import (
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const mib = 1 << 20

// imageFile is an image on the disk of the test, with what it contains.
type imageFile struct {
	path     string
	checksum string
	// files are the contents of its filesystem, by path.
	files map[string][]byte
}

// ext4Image makes a raw ext4 filesystem with a few files. No mount is needed.
func ext4Image(t testing.TB, sizeMiB int) imageFile {
	t.Helper()
	dir := t.TempDir()
	files := map[string][]byte{
		"hello.txt":         []byte("hello from the image\n"),
		"etc/os-release":    []byte("NAME=image\n"),
		"big/random.bin":    randomBytes(1, 3*mib+17),
		"empty":             {},
		"big/deep/er/one.x": randomBytes(2, 5000),
	}
	content := filepath.Join(dir, "content")
	for name, bytes := range files {
		path := filepath.Join(content, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw := filepath.Join(dir, "image.raw")
	must(t, "mke2fs", "-q", "-t", "ext4", "-d", content, raw, fmt.Sprintf("%dM", sizeMiB))
	return imageFile{path: raw, checksum: checksumOf(t, raw), files: files}
}

// compressedQcow2 is the same image as compressed qcow2.
func (f imageFile) compressedQcow2(t testing.TB) imageFile {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.qcow2")
	must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", f.path, path)
	return imageFile{path: path, checksum: checksumOf(t, path), files: f.files}
}

// verify compares a mounted filesystem with what the image contains.
func (f imageFile) verify(t testing.TB, mount string) {
	t.Helper()
	for name, want := range f.files {
		got, err := os.ReadFile(filepath.Join(mount, name))
		if err != nil {
			t.Errorf("%v", err)
		} else if string(got) != string(want) {
			t.Errorf("%s: %d bytes differ from the %d bytes in the image", name, len(got), len(want))
		}
	}
}

// randomBytes is the same for the same seed.
func randomBytes(seed int64, length int) []byte {
	bytes := make([]byte, length)
	rand.New(rand.NewSource(seed)).Read(bytes)
	return bytes
}

func checksumOf(t testing.TB, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha512.Sum512(content)
	return hex.EncodeToString(sum[:])
}

// serve serves files over HTTP with ranges and returns the base URL.
func serve(t testing.TB, files ...string) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, file := range files {
			if r.URL.Path == "/"+filepath.Base(file) {
				http.ServeFile(w, r, file)
				return
			}
		}
		http.NotFound(w, r)
	}))
	t.Cleanup(server.Close)
	return server.URL
}

func must(t testing.TB, program string, args ...string) string {
	t.Helper()
	output, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, output)
	}
	return string(output)
}

// imageYAML is a BackingImage in the form of the documentation.
func imageYAML(name, url, checksum string, copies int) string {
	return fmt.Sprintf(`apiVersion: longhorn.io/v1beta2
kind: BackingImage
metadata:
  name: %s
  namespace: longhorn-system
spec:
  dataEngine: v1
  minNumberOfCopies: %d
  sourceType: download
  sourceParameters:
    url: %s
  checksum: "%s"
`, name, copies, url, checksum)
}

// classYAML is a StorageClass in the form of the documentation.
func classYAML(class, image, url, checksum string, replicas int) string {
	return fmt.Sprintf(`kind: StorageClass
apiVersion: storage.k8s.io/v1
metadata:
  name: %s
provisioner: driver.longhorn.io
allowVolumeExpansion: true
reclaimPolicy: Delete
volumeBindingMode: Immediate
parameters:
  numberOfReplicas: "%d"
  staleReplicaTimeout: "2880"
  backingImage: "%s"
  backingImageDataSourceType: "download"
  backingImageDataSourceParameters: '{"url": "%s"}'
  backingImageChecksum: "%s"
  backingImageMinNumberOfCopies: "1"
  dataEngine: "v1"
`, class, replicas, image, url, checksum)
}

// claimYAML is a PersistentVolumeClaim.
func claimYAML(claim, class string, sizeMiB int, mode string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: %s
  namespace: default
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: %s
  volumeMode: %s
  resources:
    requests:
      storage: %dMi
`, claim, class, mode, sizeMiB)
}

// newClaim creates a StorageClass and a claim on an image, all named alike, and removes them at the end of the test.
func newClaim(t *testing.T, i *instance, name string, image imageFile, sizeMiB, replicas int, mode string) (volume string) {
	t.Helper()
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	t.Cleanup(func() { removeClaim(t, i, name) })
	i.apply(t, classYAML(name, name, url, image.checksum, replicas)+"---\n"+claimYAML(name, name, sizeMiB, mode))
	return volumeOf(t, i, name)
}

// removeClaim removes what newClaim made, after a detachment.
func removeClaim(t *testing.T, i *instance, name string) {
	t.Helper()
	i.explain(t)
	i.run("", "volume", "detach", name)
	volume := ""
	if claim, _, _ := tryGet[claimObject](i, "pvc", name); claim.Spec.VolumeName != "" {
		volume = claim.Spec.VolumeName
	}
	for _, what := range [][2]string{{"pvc", name}, {"storageclass", name}, {"backingimage", name}} {
		if what[0] == "backingimage" && volume != "" {
			// A claim goes before its volume, and an image in use is not deleted.
			untilGone(t, i, 30*time.Second, "volume", volume)
		}
		if _, stderr, code := i.run("", "delete", what[0], what[1]); code != 0 && code != 3 {
			t.Errorf("delete %s %s: exit code %d: %s", what[0], what[1], code, stderr)
		}
	}
}
