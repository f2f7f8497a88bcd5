package sanitytests

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// Kubernetes learns from ListVolumes and ControllerGetVolume where a volume is published and whether it is abnormal.
func TestVolumeConditionFollowsTheReplicas(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	removeImage(t, i, "condition")
	parameters := imageParameters("condition", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 3)
	volume := createVolume(t, i, createRequest("condition", 32*mib, parameters))
	paths, withdraw := publishOnNode(t, i, volume, 1, mountCapability())
	untilRobust(t, i, volume.VolumeId, "healthy")

	got := controllerGet(t, i, volume.VolumeId)
	if got.Status.VolumeCondition.Abnormal || len(got.Status.PublishedNodeIds) != 1 || got.Status.PublishedNodeIds[0] != nodeID(t, i, 1) {
		t.Errorf("healthy on node-1: %v", got.Status)
	}
	killStorageDaemon(t, remoteReplica(t, i, volume.VolumeId, "node-1"))
	eventually(t, 20*time.Second, "ControllerGetVolume says abnormal", func() (bool, string) {
		condition := controllerGet(t, i, volume.VolumeId).Status.VolumeCondition
		return condition.Abnormal, condition.Message
	})
	listed := findVolume(t, i, volume.VolumeId)
	if listed == nil || !listed.Status.VolumeCondition.Abnormal || len(listed.Status.PublishedNodeIds) != 1 {
		t.Errorf("ListVolumes: %v", listed)
	} else {
		mentions(t, "the condition", listed.Status.VolumeCondition.Message, "replica")
	}
	stats, err := i.node(t, 1).NodeGetVolumeStats(call(t), &csi.NodeGetVolumeStatsRequest{VolumeId: volume.VolumeId, VolumePath: paths.target})
	if err != nil || len(stats.Usage) != 2 || stats.VolumeCondition == nil {
		t.Errorf("stats of a mounted volume carry bytes, inodes and the condition: %v, %v", stats, err)
	}
	withdraw()
	if got := controllerGet(t, i, volume.VolumeId); len(got.Status.PublishedNodeIds) != 0 {
		t.Errorf("detached, but published on %v", got.Status.PublishedNodeIds)
	}
}

func controllerGet(t testing.TB, i *instance, id string) *csi.ControllerGetVolumeResponse {
	t.Helper()
	response, err := i.controller(t).ControllerGetVolume(call(t), &csi.ControllerGetVolumeRequest{VolumeId: id})
	if err != nil {
		t.Fatal(err)
	}
	return response
}

// findVolume walks the pages of ListVolumes.
func findVolume(t testing.TB, i *instance, id string) *csi.ListVolumesResponse_Entry {
	t.Helper()
	token := ""
	for {
		page, err := i.controller(t).ListVolumes(call(t), &csi.ListVolumesRequest{MaxEntries: 1, StartingToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range page.Entries {
			if entry.Volume.VolumeId == id {
				return entry
			}
		}
		if token = page.NextToken; token == "" {
			return nil
		}
	}
}
