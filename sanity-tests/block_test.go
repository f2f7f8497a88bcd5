package sanitytests

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A block volume shows the image's bytes, zeroes behind them, and keeps what is written.
func TestBlockVolume(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	content, err := os.ReadFile(image.path)
	if err != nil {
		t.Fatal(err)
	}
	removeImage(t, i, "block")
	request := createRequest("block", 32*mib, imageParameters("block", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 2))
	request.VolumeCapabilities = []*csi.VolumeCapability{blockCapability()}
	volume := createVolume(t, i, request)

	paths, withdraw := publishOnNode(t, i, volume, 1, blockCapability())
	if info, err := os.Stat(paths.target); err != nil || info.Mode()&os.ModeDevice == 0 {
		t.Fatalf("the target is no device: %v, %v", info, err)
	}
	device := readAll(t, paths.target)
	if len(device) != 32*mib || !bytes.Equal(device[:16*mib], content) || !bytes.Equal(device[16*mib:], make([]byte, 16*mib)) {
		t.Errorf("the device (%d bytes) is not the image followed by zeroes", len(device))
	}
	written := randomBytes(21, 300*1024)
	writeDevice(t, paths.target, written, 1*mib+512)
	copy(content[1*mib+512:], written)

	stats, err := i.node(t, 1).NodeGetVolumeStats(call(t), &csi.NodeGetVolumeStatsRequest{VolumeId: volume.VolumeId, VolumePath: paths.target})
	if err != nil || len(stats.Usage) != 1 || stats.Usage[0].Total != 32*mib {
		t.Errorf("stats of a block volume: %v, %v", stats, err)
	}
	// It has one writer: no second node gets it.
	_, err = i.controller(t).ControllerPublishVolume(call(t), &csi.ControllerPublishVolumeRequest{
		VolumeId: volume.VolumeId, NodeId: nodeID(t, i, 2), VolumeCapability: blockCapability(), VolumeContext: volume.VolumeContext,
	})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("attached to node-1, asked for node-2: want FailedPrecondition: %v", err)
	}
	withdraw()

	paths, withdraw = publishOnNode(t, i, volume, 2, blockCapability())
	if device := readAll(t, paths.target); !bytes.Equal(device[:16*mib], content) {
		t.Error("what was written on node-1 is not there on node-2")
	}
	withdraw()
}

func readAll(t testing.TB, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}
