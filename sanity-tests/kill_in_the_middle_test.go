package sanitytests

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// middle is the instance and the wishes of one case of the table below.
type middle struct {
	i     *instance
	name  string
	image imageFile
	url   string
	// replicas of the volume, if it is about one.
	replicas int
}

// A process is killed while a download, a sync, an attachment or a detachment is under way: it ends as wished, with the right
// bytes, nothing temporary is left, and at no time did anything wait without a reason.
//
// More of it: TestKilledDataSourceFinishesItsDownload, TestKilledAgentFinishesItsSync, and with mounted volumes TestKilledInstanceGoesOnWhereItWas and others.
func TestWhatWasKilledInTheMiddleEndsAsWished(t *testing.T) {
	i := ownInstance(t, 3)
	watchReasons(t, i)
	attachment := attachedImage(t, i)
	cases := []struct {
		phase  string
		during func(*testing.T, *middle, func(*testing.T, *middle))
		kills  map[string]func(*testing.T, *middle)
	}{
		{"download", duringDownload, map[string]func(*testing.T, *middle){
			"agent": killAgents, "standalone": restartInstance,
			"data source and standalone": func(t *testing.T, m *middle) { killDataSource(t, m); restartInstance(t, m) },
		}},
		{"hand-over", duringHandOver, map[string]func(*testing.T, *middle){
			"agent": killAgents, "data source": killDataSource, "standalone": restartInstance,
		}},
		{"sync", duringSync, map[string]func(*testing.T, *middle){
			"sending agent": killSender, "all agents": killAgents, "standalone": restartInstance,
		}},
		{"attach", duringAttach, map[string]func(*testing.T, *middle){
			"replica process": killOne("replica"), "storage daemon": killOne("qemu-storage-daemon"), "engine": killOne("engine"),
			"engine holder": killOne("engine-holder"), "standalone": whenThere("engine-holder", restartInstance),
		}},
		{"attach alone", duringAttachAlone, map[string]func(*testing.T, *middle){
			"replica process": killOne("replica"), "storage daemon": killOne("qemu-storage-daemon"),
		}},
		{"detach", duringDetach, map[string]func(*testing.T, *middle){
			"replica process": killOne("replica"), "storage daemon": killOne("qemu-storage-daemon"), "engine": killOne("engine"),
			"engine holder": killOne("engine-holder"), "standalone": restartInstance,
		}},
	}
	for _, c := range cases {
		names := []string{}
		for name := range c.kills {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			t.Run(c.phase+": "+name, func(t *testing.T) {
				i.explainOnFailure(t)
				id := strings.NewReplacer(": ", "-", " ", "-").Replace(c.phase + ": " + name)
				c.during(t, &middle{i: i, name: id, image: attachment.image, url: attachment.url, replicas: 3}, c.kills[name])
			})
		}
	}
}

// attachedImage is an image with a copy on every disk, for the volumes of attachments and detachments.
func attachedImage(t *testing.T, i *instance) *middle {
	t.Helper()
	m := &middle{i: i, name: "middle", image: ext4Image(t, 16)}
	m.url = serve(t, m.image.path) + "/" + filepath.Base(m.image.path)
	i.apply(t, imageYAML(m.name, m.url, m.image.checksum, 3))
	until(t, i, 60*time.Second, "backingimage", m.name, "has three copies", func(o imageObject) bool { return len(readyCopies(o)) == 3 })
	return m
}

// duringDownload kills when one half of an image is there.
func duringDownload(t *testing.T, m *middle, kill func(*testing.T, *middle)) {
	path, sum := m.randomFile(t, 16*mib)
	url, half, release := heldServer(t, path)
	m.i.apply(t, imageYAML(m.name, url, sum, 1))
	removeImage(t, m.i, m.name)
	select {
	case <-half:
	case <-time.After(30 * time.Second):
		t.Fatalf("the download did not begin: %s", m.i.why("backingimage", m.name))
	}
	everythingSaysWhy(t, m.i)
	kill(t, m)
	release()
	m.becomesReady(t, sum, 1)
}

// duringHandOver kills when a data source has the whole file and the agent that shall take it is stopped.
func duringHandOver(t *testing.T, m *middle, kill func(*testing.T, *middle)) {
	path, sum := m.randomFile(t, 4*mib)
	agents := slices.DeleteFunc(processesOf(m.i.dir), func(p process) bool { return !slices.Contains(p.args, "backing-image-manager") })
	if len(agents) != 3 {
		t.Fatalf("want an agent on each disk, found %v", agents)
	}
	for _, agent := range agents {
		t.Cleanup(func() { syscall.Kill(agent.pid, syscall.SIGCONT) })
		syscall.Kill(agent.pid, syscall.SIGSTOP)
	}
	m.i.apply(t, imageYAML(m.name, serve(t, path)+"/"+filepath.Base(path), sum, 1))
	removeImage(t, m.i, m.name)
	until(t, m.i, 30*time.Second, "backingimagedatasource", m.name, "is ready to hand over", func(o waiting) bool {
		return o.Status.CurrentState == "ready-for-transfer"
	})
	everythingSaysWhy(t, m.i)
	kill(t, m)
	for _, agent := range agents {
		syscall.Kill(agent.pid, syscall.SIGCONT)
	}
	m.becomesReady(t, sum, 1)
}

// duringSync kills when another disk has a part of a copy.
func duringSync(t *testing.T, m *middle, kill func(*testing.T, *middle)) {
	const size = 32 * mib
	path, sum := m.randomFile(t, size)
	url := serve(t, path) + "/" + filepath.Base(path)
	m.i.apply(t, imageYAML(m.name, url, sum, 1))
	removeImage(t, m.i, m.name)
	uuid := untilImageReady(t, m.i, m.name).Status.UUID
	copies := copyPaths(m.i, m.name, uuid)
	if len(copies) != 1 {
		t.Fatalf("want one copy, found %v", copies)
	}
	held := holdSync(t, m.i, m.name, copies[0], size, func() { m.i.apply(t, imageYAML(m.name, url, sum, 2)) })
	everythingSaysWhy(t, m.i)
	kill(t, m)
	// It is no more, when it was killed.
	syscall.Kill(held.sender, syscall.SIGCONT)
	m.becomesReady(t, sum, 2)
}

// duringAttach kills as soon as the victim of an attachment exists.
func duringAttach(t *testing.T, m *middle, kill func(*testing.T, *middle)) {
	volume := m.newVolume(t)
	request := publishRequest(t, m.i, volume, 1, blockCapability())
	ctx, cancel := context.WithTimeout(context.Background(), callWithin)
	asked, controller := make(chan struct{}), m.i.controller(t)
	go func() {
		// What it answers is no matter: it is asked again below, as the attacher does.
		controller.ControllerPublishVolume(ctx, request)
		close(asked)
	}()
	kill(t, m)
	cancel()
	<-asked
	m.serves(t, volume, 1, nil)
	m.serves(t, volume, 2, nil)
	m.leavesNothing(t)
}

// duringAttachAlone does so with a volume of a single replica, which nobody can do without.
func duringAttachAlone(t *testing.T, m *middle, kill func(*testing.T, *middle)) {
	m.replicas = 1
	duringAttach(t, m, kill)
}

// duringDetach kills while an engine wants to end and one of its replicas is stopped.
func duringDetach(t *testing.T, m *middle, kill func(*testing.T, *middle)) {
	volume := m.newVolume(t)
	id := volume.VolumeId
	paths, withdraw := publishOnNode(t, m.i, volume, 1, blockCapability())
	untilRobust(t, m.i, id, "healthy")
	blocks := startBlockLog(t, paths.target, 8*mib, 1)
	blocks.goesOn(t, 200)
	blocks.halt(t)
	blocks.check(t)
	// The one that is stopped is not the one that is killed.
	slow := slowReplica(t, m, id)
	t.Cleanup(func() { syscall.Kill(slow, syscall.SIGCONT) })
	m.withdrawPaths(t, volume, 1, paths)
	if err := syscall.Kill(slow, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	asked, controller, node := make(chan struct{}), m.i.controller(t), nodeID(t, m.i, 1)
	ctx := call(t)
	go func() {
		controller.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: node})
		close(asked)
	}()
	untilState(t, m.i, id, "detaching")
	everythingSaysWhy(t, m.i)
	kill(t, m)
	syscall.Kill(slow, syscall.SIGCONT)
	<-asked
	untilState(t, m.i, id, "detached")
	withdraw()
	m.serves(t, volume, 2, blocks)
	m.leavesNothing(t)
}

// slowReplica is the pid of the storage daemon of the replica that comes last.
func slowReplica(t *testing.T, m *middle, id string) int {
	t.Helper()
	replicas := replicasOf(t, m.i, id)
	for _, p := range processesOf(replicas[len(replicas)-1].dir()) {
		if isStorageDaemon(p) {
			return p.pid
		}
	}
	t.Fatal("there is no storage daemon")
	return 0
}

// randomFile is what a case downloads, and its checksum.
func (m *middle) randomFile(t *testing.T, size int) (path, sum string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), m.name+".raw")
	if err := os.WriteFile(path, randomBytes(int64(len(m.name)), size), 0o644); err != nil {
		t.Fatal(err)
	}
	return path, checksumOf(t, path)
}

// becomesReady waits for copies of an image, which are right, and for the end of everything temporary.
func (m *middle) becomesReady(t *testing.T, sum string, copies int) {
	t.Helper()
	object := until(t, m.i, 90*time.Second, "backingimage", m.name, fmt.Sprintf("has %d ready copies", copies), func(o imageObject) bool {
		return conditionOf(o.Status.Conditions, "Ready").Status == "True" && len(readyCopies(o)) == copies
	})
	if object.Status.Checksum != sum {
		t.Errorf("SHA-512 %s, want %s", object.Status.Checksum, sum)
	}
	noTemporaryFiles(t, m.i, m.name)
	paths := copyPaths(m.i, m.name, object.Status.UUID)
	if len(paths) != copies {
		t.Errorf("want %d copies, found %v", copies, paths)
	}
	for _, path := range paths {
		if got := checksumOf(t, path); got != sum {
			t.Errorf("%s: SHA-512 %s, want %s", path, got, sum)
		}
	}
	eventually(t, 30*time.Second, "the data source ends", func() (bool, string) {
		left := dataSources(m.i, m.name)
		return len(left) == 0, fmt.Sprint(left)
	})
}

// newVolume is a block volume over the common image.
func (m *middle) newVolume(t *testing.T) *csi.Volume {
	t.Helper()
	parameters := imageParameters("middle", m.url, m.image.checksum, m.replicas)
	parameters["backingImageMinNumberOfCopies"] = "3"
	request := createRequest(m.name, 32*mib, parameters)
	request.VolumeCapabilities = []*csi.VolumeCapability{blockCapability()}
	return createVolume(t, m.i, request)
}

// serves attaches a volume, looks at its bytes, detaches it, and compares the replicas that count.
func (m *middle) serves(t *testing.T, volume *csi.Volume, node int, blocks *blockLog) {
	t.Helper()
	paths, withdraw := publishOnNode(t, m.i, volume, node, blockCapability())
	head := make([]byte, 4*mib)
	copy(head, readAll(t, m.image.path))
	device := readAll(t, paths.target)
	if len(device) != 32*mib || string(device[:len(head)]) != string(head) {
		t.Errorf("the device (%d bytes) does not begin like its image", len(device))
	}
	if blocks != nil {
		blocks.verify(t, paths.target)
	}
	writeDevice(t, paths.target, randomBytes(int64(node), mib), 6*mib)
	untilEqual(t, m.i, volume.VolumeId)
	lost := 0
	replicas := replicasOf(t, m.i, volume.VolumeId)
	for _, r := range replicas {
		if r.Spec.FailedAt != "" {
			lost++
			mentions(t, "why", m.i.why("volume", volume.VolumeId), r.Metadata.Name)
		}
	}
	if lost > 1 {
		t.Errorf("one process was killed, but %d replicas are out: %+v", lost, replicas)
	}
	withdraw()
	untilState(t, m.i, volume.VolumeId, "detached")
	good := slices.DeleteFunc(replicasOf(t, m.i, volume.VolumeId), func(r replicaObject) bool { return r.Spec.FailedAt != "" })
	replicasAreEqual(t, m.i, good, get[imageObject](t, m.i, "backingimage", "middle"))
}

// withdrawPaths unpublishes and unstages, so that only the detachment is left.
func (m *middle) withdrawPaths(t *testing.T, volume *csi.Volume, node int, paths publishedPaths) {
	t.Helper()
	client := m.i.node(t, node)
	if _, err := client.NodeUnpublishVolume(call(t), &csi.NodeUnpublishVolumeRequest{VolumeId: volume.VolumeId, TargetPath: paths.target}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.NodeUnstageVolume(call(t), &csi.NodeUnstageVolumeRequest{VolumeId: volume.VolumeId, StagingTargetPath: paths.staging}); err != nil {
		t.Fatal(err)
	}
}

// leavesNothing waits until a detached volume has no process, mount or loop device.
func (m *middle) leavesNothing(t *testing.T) {
	t.Helper()
	eventually(t, 20*time.Second, "nothing of the attachment is left", func() (bool, string) {
		// What stays are the standalone process and the agents.
		rest := slices.DeleteFunc(leftovers(m.i.dir), func(s string) bool {
			return strings.Contains(s, " standalone ") || strings.Contains(s, " backing-image-manager ")
		})
		return len(rest) == 0, strings.Join(rest, "\n")
	})
}

// restartInstance kills controller, CSI services and instance managers, which are one process here, and starts them again.
func restartInstance(t *testing.T, m *middle) {
	t.Helper()
	m.i.kill(t)
	m.i.restart(t)
}

// killAgents kills the processes that own the image files of the disks.
func killAgents(t *testing.T, m *middle) {
	t.Helper()
	agents := slices.DeleteFunc(processesOf(m.i.dir), func(p process) bool { return !slices.Contains(p.args, "backing-image-manager") })
	if len(agents) == 0 {
		t.Fatalf("there is no agent among %v", processesOf(m.i.dir))
	}
	for _, agent := range agents {
		killProcess(t, agent.pid)
	}
}

// killSender kills the agent of the disk that has the whole copy.
func killSender(t *testing.T, m *middle) {
	t.Helper()
	paths, _ := filepath.Glob(m.i.path("nodes", "*", "*", "backing-images", m.name+"-*", "backing"))
	if len(paths) != 1 {
		t.Fatalf("want one whole copy, found %v", paths)
	}
	for _, agent := range agentsOf(t, m.i, paths[0]) {
		killProcess(t, agent.pid)
	}
}

func killDataSource(t *testing.T, m *middle) {
	t.Helper()
	sources := dataSources(m.i, m.name)
	if len(sources) != 1 {
		t.Fatalf("want one data source, found %v in %v", sources, processesOf(m.i.dir))
	}
	killProcess(t, sources[0].pid)
}

// killOne kills the first process of a role that works for the volume, as soon as there is one.
func killOne(role string) func(*testing.T, *middle) {
	return whenThere(role, func(t *testing.T, m *middle) {
		if found := m.processes(role); len(found) > 0 {
			killProcess(t, found[0].pid)
		}
	})
}

// whenThere does something as soon as a process of a role works for the volume.
func whenThere(role string, do func(*testing.T, *middle)) func(*testing.T, *middle) {
	return func(t *testing.T, m *middle) {
		t.Helper()
		deadline := time.Now().Add(30 * time.Second)
		for len(m.processes(role)) == 0 {
			if time.Now().After(deadline) {
				t.Fatalf("no %s of %s began within 30 seconds", role, m.name)
			}
			time.Sleep(time.Millisecond) // poll
		}
		do(t, m)
	}
}

// processes are those of a role that work for the volume of this case.
func (m *middle) processes(role string) (found []process) {
	dirs := []string{m.i.path("nodes")}
	if role == "qemu-storage-daemon" {
		dirs, _ = filepath.Glob(m.i.path("nodes", "*", "*", "replicas", m.name+"-*"))
	}
	for _, dir := range dirs {
		found = append(found, slices.DeleteFunc(processesOf(dir), func(p process) bool {
			if role == "qemu-storage-daemon" {
				return !isStorageDaemon(p)
			}
			return len(p.args) < 2 || p.args[1] != role || !strings.Contains(p.String(), m.name)
		})...)
	}
	return found
}
