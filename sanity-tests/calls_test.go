package sanitytests

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// callWithin is how long one CSI call may take, as with Kubernetes' sidecars.
const callWithin = time.Minute

func call(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), callWithin)
	t.Cleanup(cancel)
	return ctx
}

// mountCapability and blockCapability are what a claim with volumeMode Filesystem and Block asks for.
func mountCapability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func blockCapability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func createRequest(name string, size int64, parameters map[string]string) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name:               name,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{mountCapability()},
		Parameters:         parameters,
	}
}

// createVolume creates a volume that is deleted at the end of the test.
func createVolume(t *testing.T, i *instance, request *csi.CreateVolumeRequest) *csi.Volume {
	t.Helper()
	response, err := i.controller(t).CreateVolume(call(t), request)
	if err != nil {
		t.Fatalf("CreateVolume %s: %v", request.Name, err)
	}
	t.Cleanup(func() {
		i.explain(t)
		id := response.Volume.VolumeId
		if _, err := i.controller(t).ControllerUnpublishVolume(call(t), &csi.ControllerUnpublishVolumeRequest{VolumeId: id}); err != nil {
			t.Errorf("ControllerUnpublishVolume %s: %v", id, err)
		}
		if _, err := i.controller(t).DeleteVolume(call(t), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
			t.Errorf("DeleteVolume %s: %v", id, err)
		}
	})
	return response.Volume
}

// publish attaches a volume, as the attacher does: again while the answer is that it goes on.
func publish(t testing.TB, i *instance, volume *csi.Volume, node int, capability *csi.VolumeCapability) map[string]string {
	t.Helper()
	request := publishRequest(t, i, volume, node, capability)
	var publishContext map[string]string
	eventually(t, callWithin, "ControllerPublishVolume "+volume.VolumeId, func() (bool, string) {
		response, err := i.controller(t).ControllerPublishVolume(call(t), request)
		switch status.Code(err) {
		case codes.OK:
			publishContext = response.PublishContext
			return true, ""
		case codes.Aborted, codes.Unavailable, codes.DeadlineExceeded:
			return false, err.Error()
		}
		t.Fatalf("ControllerPublishVolume %s: %v", volume.VolumeId, err)
		return false, ""
	})
	return publishContext
}

func publishRequest(t testing.TB, i *instance, volume *csi.Volume, node int, capability *csi.VolumeCapability) *csi.ControllerPublishVolumeRequest {
	t.Helper()
	return &csi.ControllerPublishVolumeRequest{
		VolumeId: volume.VolumeId, NodeId: nodeID(t, i, node), VolumeCapability: capability, VolumeContext: volume.VolumeContext,
	}
}

func nodeID(t testing.TB, i *instance, node int) string {
	t.Helper()
	info, err := i.node(t, node).NodeGetInfo(call(t), &csi.NodeGetInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return info.NodeId
}

// publishedPaths are where a volume is staged and published on a node.
type publishedPaths struct{ staging, target string }

// publishOnNode attaches, stages and publishes a volume; withdraw undoes it, also when the test fails.
func publishOnNode(t *testing.T, i *instance, volume *csi.Volume, node int, capability *csi.VolumeCapability) (paths publishedPaths, withdraw func()) {
	t.Helper()
	publishContext := publish(t, i, volume, node, capability)
	base := i.mountPoint(t)
	paths = publishedPaths{staging: filepath.Join(base, "staging"), target: filepath.Join(base, "target")}
	if err := os.Mkdir(paths.staging, 0o755); err != nil {
		t.Fatal(err)
	}
	done := false
	withdraw = func() {
		if done {
			return
		}
		done = true
		i.explain(t)
		_, unpublish := i.node(t, node).NodeUnpublishVolume(call(t), &csi.NodeUnpublishVolumeRequest{VolumeId: volume.VolumeId, TargetPath: paths.target})
		_, unstage := i.node(t, node).NodeUnstageVolume(call(t), &csi.NodeUnstageVolumeRequest{VolumeId: volume.VolumeId, StagingTargetPath: paths.staging})
		_, detach := i.controller(t).ControllerUnpublishVolume(call(t), &csi.ControllerUnpublishVolumeRequest{VolumeId: volume.VolumeId, NodeId: nodeID(t, i, node)})
		if err := errors.Join(unpublish, unstage, detach); err != nil {
			t.Errorf("withdraw %s: %v", volume.VolumeId, err)
		}
	}
	t.Cleanup(withdraw)
	if _, err := i.node(t, node).NodeStageVolume(call(t), &csi.NodeStageVolumeRequest{
		VolumeId: volume.VolumeId, StagingTargetPath: paths.staging, VolumeCapability: capability,
		PublishContext: publishContext, VolumeContext: volume.VolumeContext,
	}); err != nil {
		t.Fatalf("NodeStageVolume %s: %v", volume.VolumeId, err)
	}
	if _, err := i.node(t, node).NodePublishVolume(call(t), &csi.NodePublishVolumeRequest{
		VolumeId: volume.VolumeId, StagingTargetPath: paths.staging, TargetPath: paths.target, VolumeCapability: capability,
		PublishContext: publishContext, VolumeContext: volume.VolumeContext,
	}); err != nil {
		t.Fatalf("NodePublishVolume %s: %v", volume.VolumeId, err)
	}
	return paths, withdraw
}

// imageParameters are StorageClass parameters that create an image by download.
func imageParameters(image, url, checksum string, replicas int) map[string]string {
	return map[string]string{
		"numberOfReplicas":                 fmt.Sprint(replicas),
		"staleReplicaTimeout":              "2880",
		"backingImage":                     image,
		"backingImageDataSourceType":       "download",
		"backingImageDataSourceParameters": fmt.Sprintf(`{"url": %q}`, url),
		"backingImageChecksum":             checksum,
		"backingImageMinNumberOfCopies":    "1",
		"dataEngine":                       "v1",
	}
}

// untilImageReady waits until an image is ready.
func untilImageReady(t testing.TB, i *instance, name string) imageObject {
	t.Helper()
	return until(t, i, 30*time.Second, "backingimage", name, "is ready", func(o imageObject) bool {
		return conditionOf(o.Status.Conditions, "Ready").Status == "True"
	})
}

// removeImage deletes an image at the end of the test.
func removeImage(t *testing.T, i *instance, name string) {
	t.Helper()
	t.Cleanup(func() {
		i.explain(t)
		if _, stderr, code := i.run("", "delete", "backingimage", name); code != 0 && code != 3 {
			t.Errorf("delete backingimage %s: exit code %d: %s", name, code, stderr)
		}
	})
}
