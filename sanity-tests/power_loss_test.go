package sanitytests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A user works on an instance whose disks log every write and flush. Then power is cut at many positions of the log, the disks become what
// they may be after that, and another instance starts on them: what was promised before the cut is there and whole.
//
// A disk may have kept any part of what it was not asked to flush, so each cut chooses: nothing of it, everything, or some sectors.
//
//	POWER_CUTS=400 POWER_CUT_SEED=7 go test -count=1 -timeout 2h -run TestWhatWasReadySurvivesALossOfPower -v .

const (
	powerCuts    = 40
	powerSeed    = 1
	powerWorkers = 2
	sectorBytes  = 512
	// Each is long, and the next ones say the same.
	enoughFailures = 2
)

// cut is one loss of power.
type cut struct {
	number   int
	position int64
	// kept is the part of the unflushed writes that reached the disk: 0 to 1.
	kept float64
	why  string
	seed int64
	// whole: also with an instance.
	whole bool
}

func (c cut) String() string {
	return fmt.Sprintf("cut %d at %d of the log (%s), %.0f %% of what was not flushed is kept, seed %d", c.number, c.position, c.why, 100*c.kept, c.seed)
}

func fromEnvironment(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	number, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s=%s is not a number", name, text)
	}
	return number
}

func TestWhatWasReadySurvivesALossOfPower(t *testing.T) {
	variants := [][]string{{"xfs", "ext4", "xfs"}, {"ext4", "xfs", "ext4"}}
	if os.Getenv("POWER_CUTS") == "" {
		variants = variants[:1]
	}
	for _, kinds := range variants {
		t.Run(strings.Join(kinds, "-"), func(t *testing.T) {
			m := newMachine(t, "data", "data/nodes/node-1/disk-1", "data/nodes/node-2/disk-1")
			plain, packed := ext4Image(t, 8), ext4Image(t, 16).compressedQcow2(t)
			m.Sources = map[string]imageSource{"plain": {plain.path, plain.checksum}, "packed": {packed.path, packed.checksum}}
			// Files show most of it; some of the cuts get an instance too.
			visible := []string{imageReady, replicaReached, detachedClean}
			testPowerLoss(t, m, kinds, "TestPowerUser", "TestPowerAfter", fromEnvironment(t, "POWER_CUTS", powerCuts), visible)
		})
	}
}

// testPowerLoss lets the test `user` work on logged disks, cuts power many times, and runs the test `after` on what is left each time.
func testPowerLoss(t *testing.T, m machine, kinds []string, user, after string, count int, visible []string) {
	t.Helper()
	seed := int64(fromEnvironment(t, "POWER_CUT_SEED", powerSeed))
	began := time.Now()
	for n, kind := range kinds {
		m.makeDisk(t, n, kind)
	}
	m.userWorks(t, user)
	log, err := os.Open(m.path("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	records, made := readLog(t, log), m.promises(t)
	cuts := chooseCuts(rand.New(rand.NewSource(seed)), records, made, count, visible)
	t.Logf("%d promises, %d writes and flushes, %d MiB of log after %.1f s; %d cuts with seed %d",
		len(made), len(records), records[len(records)-1].end/mib, time.Since(began).Seconds(), len(cuts), seed)

	began = time.Now()
	limit := make(chan struct{}, powerWorkers)
	var checks sync.WaitGroup
	var failures atomic.Int32
	m.eachCut(t, log, records, cuts, func(c cut, disks []string) {
		limit <- struct{}{}
		checks.Go(func() {
			defer func() { os.RemoveAll(filepath.Dir(disks[0])); <-limit }()
			if failures.Load() >= enoughFailures {
				return
			}
			left := m
			left.Disks, left.Cut, left.Whole = disks, c.position, c.whole || count > powerCuts
			if output, err := isolated(left, filepath.Dir(disks[0]), after); err != nil {
				failures.Add(1)
				t.Errorf("%s: %v\n%s", c, err, output)
			}
		})
	})
	checks.Wait()
	t.Logf("%d cuts in %.1f s", len(cuts), time.Since(began).Seconds())
}

// newMachine is a machine with a disk for each mount point.
func newMachine(t *testing.T, points ...string) (m machine) {
	t.Helper()
	// In memory when there is room, since a simulated disk is flushed a lot.
	parent := ""
	if free, err := freeBytes("/dev/shm"); err == nil && free > 4<<30 {
		parent = "/dev/shm"
	}
	m.Work, m.Root = place(t, parent), place(t, "")
	for _, point := range points {
		m.Points = append(m.Points, filepath.Join(m.Root, point))
	}
	return m
}

// place is a directory that goes with the test.
func place(t *testing.T, parent string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "power-cut-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cleanUp(dir)
		os.RemoveAll(dir)
	})
	return dir
}

// makeDisk makes a new filesystem and keeps a copy of it, on which the log is repeated.
func (m machine) makeDisk(t *testing.T, number int, kind string) {
	t.Helper()
	path := m.path(fmt.Sprintf("dev%d", number))
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(320 * mib); err != nil {
		t.Fatal(err)
	}
	if kind == "xfs" {
		must(t, "mkfs.xfs", "-q", path)
	} else {
		must(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
	}
	if err := copySparse(file, m.path(fmt.Sprintf("state%d", number))); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.path(fmt.Sprintf("disk%d", number)), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// userWorks runs TestPowerUser over logged disks.
func (m machine) userWorks(t *testing.T, user string) {
	t.Helper()
	devices := exec.Command(os.Args[0], "-test.run=^TestPowerDevices$", "-test.timeout=0")
	devices.Env = append(os.Environ(), devicesEnv+"="+m.Work)
	var said bytes.Buffer
	devices.Stdout, devices.Stderr = &said, &said
	if err := devices.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { devices.Wait(); close(ended) }()
	t.Cleanup(func() { devices.Process.Kill(); <-ended })
	served := func() (bool, string) {
		for n := range m.Points {
			if info, err := os.Stat(m.path(fmt.Sprintf("disk%d", n))); err != nil || info.Size() == 0 {
				return false, fmt.Sprint(n, err)
			}
		}
		return true, ""
	}
	if err := waitFor(10*time.Second, ended, served, func(last string) error { return fmt.Errorf("%s\n%s", last, &said) }); err != nil {
		t.Fatalf("the logged disks are not served: %v", err)
	}
	output, err := isolated(m, m.Work, user)
	for n := range m.Points {
		eventually(t, 10*time.Second, "the disks are free", func() (bool, string) {
			err := syscall.Unmount(m.path(fmt.Sprintf("disk%d", n)), 0)
			return err == nil, fmt.Sprint(err)
		})
	}
	if err != nil {
		t.Fatalf("the user could not work: %v\n%s", err, output)
	}
	<-ended
}

// startMachine is a shell script: the first process of a machine, which collects the ended children of those that have ended.
// Its root directory is the same tree at another place, so that its loop devices have names that no other machine takes for its own.
const startMachine = `set -e; root=$1; shift
mkdir "$root"; mount --rbind / "$root"; mount -t proc proc "$root/proc"
chroot "$root" "$@" & wait $!`

// isolated runs one test of this program on a machine of its own: namespaces for processes, mounts and network, which end with it.
func isolated(m machine, place, name string) (output string, err error) {
	text, err := json.Marshal(m)
	if err != nil {
		return "", err
	}
	program, err := filepath.Abs(os.Args[0])
	if err != nil {
		return "", err
	}
	tested, err := programUnderTest()
	if err != nil {
		return "", err
	}
	command := exec.Command("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-c", startMachine, "sh",
		filepath.Join(place, "root"), program, "-test.run=^"+name+"$", "-test.v", "-test.timeout=3m")
	command.Env = append(os.Environ(), machineEnv+"="+string(text), "BACKING_IMAGE_CSI_BINARY="+tested)
	said, err := command.CombinedOutput()
	return string(said), err
}

// chooseCuts takes half of the cuts right behind promises, with nothing kept that was not flushed: nothing that was promised may need it.
// The others are anywhere, or right before a flush, with some of it kept.
func chooseCuts(random *rand.Rand, records []logRecord, made []promise, count int, visible []string) (cuts []cut) {
	behind := map[int64]promise{}
	kinds := map[string][]promise{}
	for _, p := range made {
		kinds[p.Kind] = append(kinds[p.Kind], p)
	}
	names := slices.Sorted(maps.Keys(kinds))
	// One of each kind in turn, so that a kind with many promises leaves room for the others.
	for n := 0; len(behind) < min(count/2, len(made)); n = (n + 1) % len(names) {
		left := kinds[names[n]]
		if len(left) == 0 {
			continue
		}
		at := random.Intn(len(left))
		behind[left[at].At] = left[at]
		kinds[names[n]] = slices.Delete(left, at, at+1)
		if !slices.ContainsFunc(names, func(name string) bool { return len(kinds[name]) > 0 }) {
			break
		}
	}
	for at, p := range behind {
		cuts = append(cuts, cut{position: at, why: "behind the promise " + p.String(), whole: !slices.Contains(visible, p.Kind)})
	}
	for len(cuts) < count {
		at := random.Intn(len(records))
		c := cut{why: "anywhere", kept: []float64{0.2, 0.5, 0.8, 1}[random.Intn(4)], whole: len(cuts)%4 == 0}
		if random.Intn(2) == 0 {
			for at < len(records)-1 && records[at+1].op != opFlush {
				at++
			}
			c.why = "before a flush"
		}
		c.position = records[at].end
		cuts = append(cuts, c)
	}
	slices.SortFunc(cuts, func(a, b cut) int { return int(a.position - b.position) })
	for n := range cuts {
		cuts[n].number, cuts[n].seed = n, random.Int63()
	}
	return cuts
}

// eachCut makes the disks of each cut, in the order of the log.
func (m machine) eachCut(t *testing.T, log *os.File, records []logRecord, cuts []cut, then func(cut, []string)) {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	var state []*os.File
	for n := range m.Points {
		file, err := os.OpenFile(m.path(fmt.Sprintf("state%d", n)), os.O_RDWR, 0)
		check(err)
		defer file.Close()
		state = append(state, file)
	}
	unflushed := make([][]logRecord, len(m.Points))
	next := 0
	for _, c := range cuts {
		for ; next < len(records) && records[next].end <= c.position; next++ {
			r := records[next]
			if r.op != opFlush {
				unflushed[r.device] = append(unflushed[r.device], r)
				continue
			}
			for _, r := range unflushed[r.device] {
				check(r.apply(log, state[r.device], 0, r.length))
			}
			unflushed[r.device] = nil
		}
		place := m.path(fmt.Sprintf("cut%d", c.number))
		check(os.Mkdir(place, 0o700))
		random := rand.New(rand.NewSource(c.seed))
		var paths []string
		for n := range m.Points {
			path := filepath.Join(place, fmt.Sprintf("disk%d", n))
			check(copySparse(state[n], path))
			disk, err := os.OpenFile(path, os.O_RDWR, 0)
			check(err)
			for _, r := range unflushed[n] {
				check(r.applySome(random, c.kept, log, disk))
			}
			check(disk.Close())
			paths = append(paths, path)
		}
		then(c, paths)
	}
}

// applySome keeps a write, loses it, or, once in a while, keeps some of its sectors.
func (r logRecord) applySome(random *rand.Rand, kept float64, log, disk *os.File) error {
	torn := kept > 0 && kept < 1 && random.Intn(8) == 0
	if !torn {
		if random.Float64() < kept {
			return r.apply(log, disk, 0, r.length)
		}
		return nil
	}
	for at := int64(0); at < r.length; at += sectorBytes {
		if random.Float64() < kept {
			if err := r.apply(log, disk, at, min(at+sectorBytes, r.length)); err != nil {
				return err
			}
		}
	}
	return nil
}
