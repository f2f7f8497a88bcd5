package sanitytests

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// One replica of three dies under a writer: no error, degraded with the reason, and it never rejoins by itself.
func TestKilledReplicaDegradesTheVolume(t *testing.T) {
	testKilledReplica(t, killStorageDaemon)
}

// The same when our process beside the qemu-storage-daemon dies.
func TestKilledReplicaProcessDegradesTheVolume(t *testing.T) {
	testKilledReplica(t, killReplicaProcess)
}

func testKilledReplica(t *testing.T, kill func(*testing.T, replicaObject)) {
	i := sharedInstance(t)
	image := ext4Image(t, 64)
	volume := newClaim(t, i, "degraded", image, 96, 3, "Filesystem")
	mount := i.mountPoint(t)
	t.Cleanup(func() { i.run("", "volume", "unmount", "degraded", "--node", "node-1", mount) })
	i.cli(t, "volume", "mount", "degraded", "--node", "node-1", mount)
	untilRobust(t, i, volume, "healthy")
	w := startWriter(t, mount+"/records")
	w.goesOn(t, 50)

	victim := remoteReplica(t, i, volume, "node-1")
	kill(t, victim)
	w.goesOn(t, 200)
	untilRobust(t, i, volume, "degraded")
	until(t, i, 20*time.Second, "replica", victim.Metadata.Name, "is marked as failed", func(r replicaObject) bool {
		return r.Spec.FailedAt != "" && r.Spec.FailedReason != ""
	})
	mentions(t, "why", i.why("volume", volume), victim.Metadata.Name, "degraded")
	w.finish(t)

	i.cli(t, "volume", "unmount", "degraded", "--node", "node-1", mount)
	i.cli(t, "volume", "detach", "degraded")
	untilState(t, i, volume, "detached")
	second := i.mountPoint(t)
	t.Cleanup(func() { i.run("", "volume", "unmount", "degraded", "--node", "node-2", second) })
	i.cli(t, "volume", "mount", "degraded", "--node", "node-2", second)
	image.verify(t, second)
	w.verify(t, second+"/records")
	untilRobust(t, i, volume, "degraded")
	if r := get[replicaObject](t, i, "replica", victim.Metadata.Name); r.Spec.FailedAt == "" || r.Status.CurrentState == "running" {
		t.Errorf("the failed replica came back: %+v %+v", r.Spec, r.Status)
	}
	i.cli(t, "volume", "unmount", "degraded", "--node", "node-2", second)
	i.cli(t, "volume", "detach", "degraded")
	untilState(t, i, volume, "detached")
	good := slices.DeleteFunc(replicasOf(t, i, volume), func(r replicaObject) bool { return r.Spec.FailedAt != "" })
	if len(good) != 2 {
		t.Errorf("want two good replicas, found %+v", good)
	}
	replicasAreEqual(t, i, good, get[imageObject](t, i, "backingimage", "degraded"))
}

// replicasAreEqual compares the content of the replicas of a detached volume, each over the copy on its own disk.
func replicasAreEqual(t *testing.T, i *instance, replicas []replicaObject, image imageObject) {
	t.Helper()
	for _, r := range replicas {
		until(t, i, 20*time.Second, "replica", r.Metadata.Name, "has stopped", func(r replicaObject) bool { return r.Status.CurrentState == "stopped" })
	}
	content := func(r replicaObject) string {
		base := filepath.Join(r.Spec.DiskPath, "backing-images", image.Metadata.Name+"-"+image.Status.UUID, "backing")
		return fmt.Sprintf(`json:{"driver":"qcow2","file":{"driver":"file","filename":%q},"backing":{"driver":%q,"read-only":true,"file":{"driver":"file","filename":%q}}}`,
			filepath.Join(r.dir(), "volume-head.qcow2"), image.Status.Format, base)
	}
	for _, other := range replicas[1:] {
		must(t, "qemu-img", "compare", content(replicas[0]), content(other))
	}
}

// remoteReplica is a replica on another node than the engine.
func remoteReplica(t *testing.T, i *instance, volume, node string) replicaObject {
	t.Helper()
	replicas := replicasOf(t, i, volume)
	at := slices.IndexFunc(replicas, func(r replicaObject) bool { return r.Spec.NodeID != node })
	if at < 0 {
		t.Fatalf("no replica away from %s: %+v", node, replicas)
	}
	return replicas[at]
}

// All replicas die: the volume is faulted and says so, and what was acknowledged is still in their files.
func TestLastReplicaKilledFaultsTheVolume(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	removeImage(t, i, "faulted")
	request := createRequest("faulted", 32*mib, imageParameters("faulted", url, image.checksum, 2))
	request.VolumeCapabilities = []*csi.VolumeCapability{blockCapability()}
	volume := createVolume(t, i, request)
	paths, withdraw := publishOnNode(t, i, volume, 1, blockCapability())
	pattern := make([]byte, mib)
	for n := range pattern {
		pattern[n] = 0xab
	}
	writeDevice(t, paths.target, pattern, 20*mib)

	replicas := replicasOf(t, i, volume.VolumeId)
	for _, r := range replicas {
		killStorageDaemon(t, r)
	}
	untilRobust(t, i, volume.VolumeId, "faulted")
	mentions(t, "why", i.why("volume", volume.VolumeId), "faulted")
	withdraw()
	untilState(t, i, volume.VolumeId, "detached")
	// Nobody gets it as if nothing had happened.
	_, err := i.controller(t).ControllerPublishVolume(call(t), publishRequest(t, i, volume, 2, blockCapability()))
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("want FailedPrecondition: %v", err)
	}
	mentions(t, "the error", status.Convert(err).Message(), volume.VolumeId, "faulted", "its data is left as it is")
	text := i.why("volume", volume.VolumeId)
	for _, r := range replicas {
		mentions(t, "why", text, r.Metadata.Name, "You can:")
	}
	for _, r := range replicas {
		head := filepath.Join(r.dir(), "volume-head.qcow2")
		options := fmt.Sprintf(`json:{"driver":"qcow2","file":{"driver":"file","filename":%q},"backing":null}`, head)
		if output := must(t, "qemu-io", "-r", "-c", "read -P 0xab 20M 1M", options); strings.Contains(output, "verification failed") {
			t.Errorf("%s: %s", head, output)
		}
	}
}

// writeDevice writes to a block device and waits until it is on stable storage.
func writeDevice(t testing.TB, path string, content []byte, offset int64) {
	t.Helper()
	device, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	if _, err := device.WriteAt(content, offset); err != nil {
		t.Fatal(err)
	}
	if err := device.Sync(); err != nil {
		t.Fatal(err)
	}
}
