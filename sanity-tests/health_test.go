package sanitytests

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// Kubernetes learns where a volume is published and what is wrong with it (CSI 1.13 calls that health; older versions called it the volume condition).
func TestVolumeHealthFollowsTheReplicas(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	removeImage(t, i, "health")
	parameters := imageParameters("health", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 3)
	volume := createVolume(t, i, createRequest("health", 32*mib, parameters))
	paths, withdraw := publishOnNode(t, i, volume, 1, mountCapability())
	untilRobust(t, i, volume.VolumeId, "healthy")

	if problems := healthOf(t, i, volume.VolumeId); len(problems) != 0 {
		t.Errorf("a healthy volume has problems: %v", problems)
	}
	if got := publishedNodes(t, i, volume.VolumeId); len(got) != 1 || got[0] != nodeID(t, i, 1) {
		t.Errorf("published on %v, want node-1", got)
	}
	victim := remoteReplica(t, i, volume.VolumeId, "node-1")
	killStorageDaemon(t, victim)
	eventually(t, 20*time.Second, "ControllerGetVolumeHealth says degraded", func() (bool, string) {
		problems := healthOf(t, i, volume.VolumeId)
		return len(problems) > 0 && problems[0].Status == csi.VolumeHealthErrorType_DEGRADED && problems[0].Message != "", ""
	})
	if !listsProblems(t, i, volume.VolumeId) {
		t.Error("ControllerListVolumeHealth does not list the degraded volume")
	}
	stats, err := i.node(t, 1).NodeGetVolumeStats(call(t), &csi.NodeGetVolumeStatsRequest{VolumeId: volume.VolumeId, VolumePath: paths.target})
	if err != nil || len(stats.Usage) != 2 {
		t.Errorf("stats of a mounted volume are bytes and inodes: %v, %v", stats, err)
	}
	withdraw()
	if got := publishedNodes(t, i, volume.VolumeId); len(got) != 0 {
		t.Errorf("detached, but published on %v", got)
	}
}

func healthOf(t testing.TB, i *instance, id string) []*csi.VolumeHealth_VolumeHealthEntry {
	t.Helper()
	response, err := i.controller(t).ControllerGetVolumeHealth(call(t), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
	if err != nil {
		t.Fatal(err)
	}
	return response.VolumeHealth.HealthStatuses
}

// listsProblems walks the pages of ControllerListVolumeHealth.
func listsProblems(t testing.TB, i *instance, id string) bool {
	t.Helper()
	token := ""
	for {
		page, err := i.controller(t).ControllerListVolumeHealth(call(t), &csi.ControllerListVolumeHealthRequest{MaxEntries: 1, StartingToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range page.Entries {
			if entry.VolumeId == id && len(entry.HealthStatuses) > 0 {
				return true
			}
		}
		if token = page.NextToken; token == "" {
			return false
		}
	}
}

// publishedNodes asks ControllerGetVolume and ListVolumes, page by page, which must agree.
func publishedNodes(t testing.TB, i *instance, id string) []string {
	t.Helper()
	got, err := i.controller(t).ControllerGetVolume(call(t), &csi.ControllerGetVolumeRequest{VolumeId: id})
	if err != nil {
		t.Fatal(err)
	}
	nodes := got.Status.PublishedNodeIds
	token := ""
	for {
		page, err := i.controller(t).ListVolumes(call(t), &csi.ListVolumesRequest{MaxEntries: 1, StartingToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range page.Entries {
			if entry.Volume.VolumeId == id {
				if len(entry.Status.PublishedNodeIds) != len(nodes) {
					t.Errorf("ListVolumes says %v, ControllerGetVolume %v", entry.Status.PublishedNodeIds, nodes)
				}
				return nodes
			}
		}
		if token = page.NextToken; token == "" {
			t.Errorf("ListVolumes does not list %s", id)
			return nodes
		}
	}
}
