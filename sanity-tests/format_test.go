package sanitytests

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// The node plugin is killed -9 in the middle of mkfs. What mkfs left is not blank; the next attempt, on another node, knows whose it is.
func TestNodePluginKilledWhileItFormatsFormatsAgain(t *testing.T) {
	tools := t.TempDir()
	// It writes what has no signature, kills who started it, and takes itself away: the next mkfs is the real one.
	script := `#!/bin/sh
for device; do :; done
dd if=/dev/urandom of="$device" bs=4096 count=64 seek=1 conv=fsync,notrunc 2>/dev/null
rm "$0"
kill -9 $PPID
`
	if err := os.WriteFile(filepath.Join(tools, "mkfs.ext4"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", tools+":"+path)
	i := ownInstance(t, 2)
	t.Setenv("PATH", path)
	volume := createVolume(t, i, createRequest("cut-off", 64*mib, map[string]string{"numberOfReplicas": "2"}))
	staging := i.mountPoint(t)
	request := &csi.NodeStageVolumeRequest{VolumeId: volume.VolumeId, StagingTargetPath: staging, VolumeCapability: mountCapability()}
	request.PublishContext = publish(t, i, volume, 1, mountCapability())
	if _, err := i.node(t, 1).NodeStageVolume(call(t), request); err == nil {
		t.Fatal("it was staged although the plugin was to be killed")
	}
	select {
	case <-i.exited:
	case <-time.After(readyWithin):
		t.Fatal("mkfs did not kill the plugin")
	}
	i.disconnect()
	i.restart(t)
	device := engineOf(t, i, volume.VolumeId).Status.Endpoint
	if content := readAll(t, device); bytes.Equal(content, make([]byte, len(content))) {
		t.Fatal("mkfs left nothing behind, so nothing is shown here")
	}
	type noted struct {
		Status struct{ UnfinishedFilesystem string }
	}
	if v := get[noted](t, i, "volume", volume.VolumeId); v.Status.UnfinishedFilesystem != "ext4" {
		t.Errorf("the volume does not say that it was being formatted: %+v", v)
	}
	detach := &csi.ControllerUnpublishVolumeRequest{VolumeId: volume.VolumeId, NodeId: nodeID(t, i, 1)}
	if _, err := i.controller(t).ControllerUnpublishVolume(call(t), detach); err != nil {
		t.Fatal(err)
	}

	written := randomBytes(3, mib)
	for node := 2; node > 0; node-- {
		paths, withdraw := publishOnNode(t, i, volume, node, mountCapability())
		file := filepath.Join(paths.target, "file")
		if node == 2 {
			writeSynced(t, file, written)
		} else if content, err := os.ReadFile(file); err != nil || !bytes.Equal(content, written) {
			t.Errorf("what was written after the second attempt is not there: %d bytes, %v", len(content), err)
		}
		if v := get[noted](t, i, "volume", volume.VolumeId); v.Status.UnfinishedFilesystem != "" {
			t.Errorf("the volume is in use and still counts as unfinished: %s", fmt.Sprint(v))
		}
		withdraw()
	}
}
