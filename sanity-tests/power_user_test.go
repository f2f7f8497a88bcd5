package sanitytests

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
)

// What the user of TestWhatWasReadySurvivesALossOfPower does, and what was promised to him at which position of the log.

// machineEnv says to the parts of TestWhatWasReadySurvivesALossOfPower where their machine is.
const machineEnv = "POWER_CUT_MACHINE"

// machine is one computer: its disks, its files and its address, in namespaces of its own. Ending its first process is a power cut to everything that runs on it.
type machine struct {
	// Work holds disks, log, images and promises; Root is the directory of the instance, the mount point of the disks.
	Work, Root string
	// Points are where the disks belong: the instance's own files, and one disk for each of two nodes.
	Points []string
	// Sources are the images that are offered for download, by name.
	Sources map[string]imageSource
	// Disks are the images of the disks at the time of the cut; empty for the user's machine.
	Disks []string
	// Cut is the position of the log at which power went.
	Cut int64
	// Whole: not only the files are looked at.
	Whole bool
}

type imageSource struct{ File, Checksum string }

const (
	sourceAddress = "127.0.0.1:8088"
	powerVolume   = "work"
)

func (m machine) path(name string) string { return filepath.Join(m.Work, name) }

// thisMachine is the machine that a process belongs to; it skips the test outside of one.
func thisMachine(t *testing.T) (m machine) {
	t.Helper()
	text := os.Getenv(machineEnv)
	if text == "" {
		t.Skip("a part of TestWhatWasReadySurvivesALossOfPower")
	}
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatal(err)
	}
	if err := loopbackUp(); err != nil {
		t.Fatalf("cannot bring up the loopback interface: %v", err)
	}
	// A new boot: nothing is left in /run, and the kernel says another boot id.
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	boot := filepath.Join("/run", "boot_id")
	id := fmt.Sprintf("%08x-0000-4000-8000-%012x\n", os.Getpid(), time.Now().UnixNano()&0xffffffffffff)
	if err := os.WriteFile(boot, []byte(id), 0o444); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(boot, "/proc/sys/kernel/random/boot_id", "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	// Everything else that it has is its own as well.
	if err := syscall.Mount("tmpfs", m.Root, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m machine) instance(t *testing.T) *instance {
	t.Helper()
	program, err := programUnderTest()
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{
		binary: program, root: m.Root, dir: filepath.Join(m.Root, "data"), listen: "127.0.0.1:9500", nodes: 2,
		conns: map[string]*grpc.ClientConn{}, explained: map[testing.TB]bool{},
	}
	i.explainOnFailure(t)
	if err := i.start(); err != nil {
		t.Fatal(err)
	}
	return i
}

// offer serves the images and counts the downloads of each.
func (m machine) offer(t *testing.T) (downloads func() []string) {
	t.Helper()
	listener, err := net.Listen("tcp", sourceAddress)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan string, 1000)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		source, known := m.Sources[strings.TrimPrefix(r.URL.Path, "/")]
		if !known {
			http.NotFound(w, r)
			return
		}
		asked <- strings.TrimPrefix(r.URL.Path, "/")
		http.ServeFile(w, r, source.File)
	})}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return func() (names []string) {
		for {
			select {
			case name := <-asked:
				names = append(names, name)
			default:
				return names
			}
		}
	}
}

// A promise is what must hold after every power cut behind At, and before Until if that is not 0.
type promise struct {
	At, Until int64
	Kind      string
	Name      string
	Paths     []string
	Count     int64
}

const (
	imageReady     = "image is ready"              // Name; Paths: the disks that have a copy
	volumeThere    = "volume was created"          // Name of the claim; Paths: the volume
	recordsWritten = "records were written"        // Count of them, on the volume of the claim Name
	replicaReached = "replica reached"             // Paths: the replica.json; Count: the generation
	replicaDropped = "replica was dropped"         // Name: the replica
	isGone         = "object is gone"              // Name; Paths: the kind
	detachedClean  = "volume was detached cleanly" // Paths: the replica.json of each
)

// promises are written down while the user works.
type promises struct {
	log, file string
	list      []promise
}

func (m machine) newPromises() *promises {
	return &promises{log: m.path("log"), file: m.path("promises.json")}
}

func (p *promises) save(t testing.TB) {
	t.Helper()
	text, err := json.Marshal(p.list)
	if err == nil {
		err = os.WriteFile(p.file, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// promises reads all of them.
func (m machine) promises(t testing.TB) (made []promise) {
	t.Helper()
	text, err := os.ReadFile(m.path("promises.json"))
	if err == nil {
		err = json.Unmarshal(text, &made)
	}
	if err != nil {
		t.Fatalf("the user wrote no promises down: %v", err)
	}
	return made
}

// position is where the log stands: what was acknowledged before the call is in front of it.
func (p *promises) position(t testing.TB) int64 {
	t.Helper()
	info, err := os.Stat(p.log)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func (p *promises) made(t testing.TB, kind, name string, count int64, paths ...string) {
	t.Helper()
	p.list = append(p.list, promise{At: p.position(t), Kind: kind, Name: name, Paths: paths, Count: count})
}

// end says that the user is about to undo what was promised.
func (p *promises) end(t testing.TB, which func(promise) bool) {
	t.Helper()
	at := p.position(t)
	for n := range p.list {
		if p.list[n].Until == 0 && which(p.list[n]) {
			p.list[n].Until = at
		}
	}
}

func (p promise) holdsAt(cut int64) bool { return p.At <= cut && (p.Until == 0 || cut <= p.Until) }

func (p promise) String() string {
	return fmt.Sprintf("%s: %s %d %v", p.Kind, p.Name, p.Count, p.Paths)
}

// TestPowerUser is the process of the user; alone it does nothing.
func TestPowerUser(t *testing.T) {
	m := thisMachine(t)
	m.offer(t)
	for n, point := range m.Points {
		mountDisk(t, m.path(fmt.Sprintf("disk%d", n)), point)
	}
	p := m.newPromises()
	i := m.instance(t)
	m.work(t, i, p)
	p.save(t)
}

func (m machine) url(image string) string { return "http://" + sourceAddress + "/" + image }

func (m machine) work(t *testing.T, i *instance, p *promises) {
	i.apply(t, imageYAML("plain", m.url("plain"), m.Sources["plain"].Checksum, 1))
	copies := m.readyCopies(t, i, "plain", 1)
	p.made(t, imageReady, "plain", 0, copies...)
	i.apply(t, imageYAML("plain", m.url("plain"), m.Sources["plain"].Checksum, 2))
	p.made(t, imageReady, "plain", 0, m.readyCopies(t, i, "plain", 2)...)
	i.apply(t, imageYAML("packed", m.url("packed"), m.Sources["packed"].Checksum, 1))
	p.made(t, imageReady, "packed", 0, m.readyCopies(t, i, "packed", 1)...)

	class := classYAML(powerVolume, "packed", m.url("packed"), m.Sources["packed"].Checksum, i.nodes)
	i.apply(t, class+"---\n"+claimYAML(powerVolume, powerVolume, 32, "Filesystem"))
	volume := volumeOf(t, i, powerVolume)
	p.made(t, volumeThere, powerVolume, 0, volume)

	w := &recorder{volume: volume, mount: filepath.Join(m.Root, "mount")}
	w.attach(t, i, p, 1)
	p.made(t, imageReady, "packed", 0, m.readyCopies(t, i, "packed", 2)...)
	for range 24 {
		w.write(t, p)
	}
	w.detach(t, i, p)
	w.attach(t, i, p, 2)
	for range 8 {
		w.write(t, p)
	}
	// One of the two replicas dies: it must never be taken for current again, whatever was lost with the power.
	victim := remoteReplica(t, i, volume, "node-2")
	killStorageDaemon(t, victim)
	for range 12 {
		w.write(t, p)
	}
	p.end(t, func(p promise) bool { return p.Kind == replicaReached && slices.Contains(p.Paths, victim.recordFile()) })
	p.made(t, replicaDropped, victim.Metadata.Name, 0)
	w.reached(t, i, p)
	w.detach(t, i, p)

	p.end(t, func(p promise) bool { return p.Kind != imageReady })
	i.cli(t, "delete", "pvc", powerVolume)
	untilGone(t, i, 20*time.Second, "volume", volume)
	p.made(t, isGone, volume, 0, "volume")
	p.end(t, func(p promise) bool { return p.Kind == imageReady && p.Name == "packed" })
	i.cli(t, "delete", "backingimage", "packed")
	untilGone(t, i, 20*time.Second, "backingimage", "packed")
	p.made(t, isGone, "packed", 0, "backingimage")
}

// readyCopies waits until an image is ready on so many disks and returns those, as paths.
func (m machine) readyCopies(t *testing.T, i *instance, name string, count int) (disks []string) {
	t.Helper()
	var ready []string
	until(t, i, 60*time.Second, "backingimage", name, "is ready", func(o imageObject) bool {
		ready = readyCopies(o)
		return conditionOf(o.Status.Conditions, "Ready").Status == "True" && len(ready) == count
	})
	for _, disk := range m.Points[1:] {
		if slices.Contains(ready, diskUUID(t, disk)) {
			disks = append(disks, disk)
		}
	}
	return disks
}

// recordFile is the path of a replica's durable record.
func (r replicaObject) recordFile() string { return filepath.Join(r.dir(), "replica.json") }

// recorder writes records to a file on the volume, each synced before the next.
type recorder struct {
	volume, mount string
	file          *os.File
	count         int64
}

const recordsFile = "records"

func (w *recorder) attach(t *testing.T, i *instance, p *promises, node int) {
	t.Helper()
	p.end(t, func(p promise) bool { return p.Kind == detachedClean })
	i.cli(t, "volume", "mount", powerVolume, "--node", fmt.Sprintf("node-%d", node), w.mount)
	w.reached(t, i, p)
	file, err := os.OpenFile(filepath.Join(w.mount, recordsFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	w.file = file
}

// reached promises the generation of every replica that takes part: the attachment was answered, so they have recorded it.
func (w *recorder) reached(t *testing.T, i *instance, p *promises) {
	t.Helper()
	generation := int64(engineOf(t, i, w.volume).Status.Generation)
	if generation == 0 {
		t.Fatal("an attached volume has no generation")
	}
	for _, r := range replicasOf(t, i, w.volume) {
		if r.Spec.FailedAt == "" {
			p.made(t, replicaReached, r.Metadata.Name, generation, r.recordFile())
		}
	}
}

func (w *recorder) write(t *testing.T, p *promises) {
	t.Helper()
	if _, err := w.file.WriteAt(record(w.count), w.count*recordSize); err != nil {
		t.Fatal(err)
	}
	if err := w.file.Sync(); err != nil {
		t.Fatal(err)
	}
	w.count++
	p.made(t, recordsWritten, powerVolume, w.count)
}

func (w *recorder) detach(t *testing.T, i *instance, p *promises) {
	t.Helper()
	w.file.Close()
	node := get[volumeObject](t, i, "volume", w.volume).Status.CurrentNodeID
	i.cli(t, "volume", "unmount", powerVolume, "--node", node, w.mount)
	i.cli(t, "volume", "detach", powerVolume)
	untilState(t, i, w.volume, "detached")
	var records []string
	for _, r := range replicasOf(t, i, w.volume) {
		if r.Spec.FailedAt == "" {
			records = append(records, r.recordFile())
		}
	}
	p.made(t, detachedClean, w.volume, 0, records...)
}
