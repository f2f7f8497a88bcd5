// Image files, and where the nodes find them.
package e2e

import (
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// image is a raw file with an ext4 filesystem, in which stand hello.txt and some more bytes.
type image struct {
	path, url, checksum string
	// How many the BackingImage and the class ask for; they must not differ.
	copies int
}

const hello = "hello from the image"

// newImage makes an image of that many MiB and serves it for the time of the test. Its content differs from test to test.
func newImage(t *testing.T, sizeMiB int) image {
	t.Helper()
	folder := t.TempDir()
	content := filepath.Join(folder, "content")
	must(t, os.MkdirAll(filepath.Join(content, "etc"), 0o755))
	must(t, os.WriteFile(filepath.Join(content, "hello.txt"), []byte(hello+"\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(content, "etc", "flow"), []byte(t.Name()+"\n"), 0o644))
	path := filepath.Join(folder, "image.raw")
	file, err := os.Create(path)
	must(t, err)
	must(t, file.Truncate(int64(sizeMiB)<<20))
	must(t, file.Close())
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-m0", "-b4096", "-d", content, path).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	bytes, err := os.ReadFile(path)
	must(t, err)
	sum := sha512.Sum512(bytes)

	listener, err := net.Listen("tcp", outside+":0")
	must(t, err)
	server := &http.Server{Handler: http.FileServer(http.Dir(folder))}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close() })
	return image{path: path, url: fmt.Sprintf("http://%s/image.raw", listener.Addr()), checksum: hex.EncodeToString(sum[:]), copies: 1}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// manifest is the BackingImage of the second document.
func (i image) manifest(name string) string {
	return fmt.Sprintf(`apiVersion: longhorn.io/v1beta2
kind: BackingImage
metadata:
  name: %s
  namespace: longhorn-system
spec:
  dataEngine: v1
  minNumberOfCopies: %d
  nodeSelector:
    - "node1"
  diskSelector:
    - "disk1"
  sourceType: download
  sourceParameters:
    url: %s
  checksum: %s
`, name, i.copies, i.url, i.checksum)
}

// parameters are those of the second document's StorageClass.
func (i image) parameters(image string, replicas int) map[string]string {
	return map[string]string{
		"numberOfReplicas":                 fmt.Sprint(replicas),
		"staleReplicaTimeout":              "2880",
		"backingImage":                     image,
		"backingImageDataSourceType":       "download",
		"backingImageDataSourceParameters": fmt.Sprintf(`{"url": "%s"}`, i.url),
		"backingImageChecksum":             i.checksum,
		"backingImageMinNumberOfCopies":    fmt.Sprint(i.copies),
		"backingImageNodeSelector":         "node1",
		"backingImageDiskSelector":         "disk1",
		"dataEngine":                       "v1",
	}
}

// class is the StorageClass of the second document. Another binding mode may stand in it.
func (i image) class(name, image string, replicas int, mode ...string) string {
	binding := "Immediate"
	if len(mode) > 0 {
		binding = mode[0]
	}
	given := i.parameters(image, replicas)
	var parameters strings.Builder
	for _, key := range slices.Sorted(maps.Keys(given)) {
		fmt.Fprintf(&parameters, "  %s: '%s'\n", key, given[key])
	}
	return fmt.Sprintf(`kind: StorageClass
apiVersion: storage.k8s.io/v1
metadata:
  name: %s
provisioner: driver.longhorn.io
allowVolumeExpansion: true
reclaimPolicy: Delete
volumeBindingMode: %s
parameters:
%s`, name, binding, parameters.String())
}

// claimOf is a PersistentVolumeClaim; mode is Filesystem or Block.
func claimOf(name, class, mode, access string, sizeMiB int) string {
	return fmt.Sprintf(`apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: %s
  namespace: default
spec:
  accessModes: [%s]
  volumeMode: %s
  storageClassName: %s
  resources:
    requests:
      storage: %dMi
`, name, access, mode, class, sizeMiB)
}

// idle is what a pod does that only holds its volume.
const idle = "trap 'exit 0' TERM; sleep 100000 & wait"

// podOf is a pod that holds a claim, at /data or as /dev/volume; node may be empty.
func podOf(name, claim, node string, block bool) string {
	return podDoing(idle, name, claim, node, block)
}

// writerOf is a pod that writes a number every moment, each on the disk before the next, until it is told to stop (stopWriter).
func writerOf(name, claim, node string) string {
	return podDoing("n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); echo $n | dd of=/data/log oflag=append conv=notrunc,fsync 2>/dev/null || echo $n >>/tmp/failed; done; "+
		"echo $n >/tmp/last; "+idle, name, claim, node, false)
}

// podDoing is a pod that runs a script.
func podDoing(script, name, claim, node string, block bool) string {
	use := "volumeMounts: [{name: volume, mountPath: /data}]"
	if block {
		use = "volumeDevices: [{name: volume, devicePath: /dev/volume}]"
	}
	placed := ""
	if node != "" {
		placed = "nodeSelector: {kubernetes.io/hostname: " + node + "}"
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: %s
  namespace: default
spec:
  terminationGracePeriodSeconds: 1
  %s
  containers:
    - name: main
      image: test.local/busybox:1
      command: [sh, -c, %q]
      %s
  volumes:
    - name: volume
      persistentVolumeClaim: {claimName: %s}
`, name, placed, script, use, claim)
}
