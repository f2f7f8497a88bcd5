package sanitytests

import (
	"slices"
	"syscall"
	"testing"
	"time"
)

// The whole instance dies while a volume is mounted and written: the writer notices nothing, and afterwards everything is adopted.
func TestKilledInstanceGoesOnWhereItWas(t *testing.T) {
	testRestart(t, syscall.SIGKILL)
}

// A polite end leaves volumes mounted too.
func TestTerminatedInstanceLeavesVolumesMounted(t *testing.T) {
	testRestart(t, syscall.SIGTERM)
}

func testRestart(t *testing.T, signal syscall.Signal) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 64)
	volume := newClaim(t, i, "survivor", image, 96, 3, "Filesystem")
	mount := i.mountPoint(t)
	t.Cleanup(func() { i.run("", "volume", "unmount", "survivor", "--node", "node-1", mount) })
	i.cli(t, "volume", "mount", "survivor", "--node", "node-1", mount)
	w := startWriter(t, mount+"/records")
	w.goesOn(t, 50)
	untilRobust(t, i, volume, "healthy")
	before, endpoint := dataPlane(i), engineOf(t, i, volume)
	images := get[imageObject](t, i, "backingimage", "survivor")
	if len(before) < 8 {
		t.Fatalf("want 3 replicas, 3 qemu-storage-daemons, a holder and an engine, found %v in %v", before, processesOf(i.dir))
	}

	i.signal(t, signal)
	w.goesOn(t, 200)
	image.verify(t, mount)
	written := randomBytes(31, 5*mib+3)
	writeSynced(t, mount+"/during.bin", written)
	sum := checksumOf(t, mount+"/during.bin")
	if during := dataPlane(i); !slices.Equal(before, during) {
		t.Errorf("the data plane changed when the instance ended: %v, then %v", before, during)
	}
	i.restart(t)
	w.goesOn(t, 200)

	untilRobust(t, i, volume, "healthy")
	until(t, i, 30*time.Second, "engine", endpoint.Metadata.Name, "runs as before", func(e engineObject) bool {
		return e.Status.CurrentState == "running" && e.Status.Endpoint == endpoint.Status.Endpoint
	})
	if after := dataPlane(i); !slices.Equal(before, after) {
		t.Errorf("the data plane was not adopted: %v, then %v", before, after)
	}
	again := get[imageObject](t, i, "backingimage", "survivor")
	if again.Metadata.UID != images.Metadata.UID || again.Status.UUID != images.Status.UUID {
		t.Errorf("the image is another object now: %+v, then %+v", images.Metadata, again.Metadata)
	}
	until(t, i, 30*time.Second, "backingimage", "survivor", "has its copies", func(o imageObject) bool {
		ready := 0
		for _, file := range o.Status.DiskFileStatusMap {
			if file.State == "ready" {
				ready++
			}
		}
		return ready == 3
	})
	w.finish(t)
	image.verify(t, mount)

	i.cli(t, "volume", "unmount", "survivor", "--node", "node-1", mount)
	i.cli(t, "volume", "detach", "survivor")
	untilState(t, i, volume, "detached")
	replicasAreEqual(t, i, replicasOf(t, i, volume), again)
	second := i.mountPoint(t)
	i.cli(t, "volume", "mount", "survivor", "--node", "node-3", second)
	image.verify(t, second)
	w.verify(t, second+"/records")
	if got := checksumOf(t, second+"/during.bin"); got != sum {
		t.Errorf("what was written while the instance was dead has SHA-512 %s, want %s", got[:16], sum[:16])
	}
	i.cli(t, "volume", "unmount", "survivor", "--node", "node-3", second)
	i.cli(t, "volume", "detach", "survivor")
}
