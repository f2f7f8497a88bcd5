package sanitytests

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

const (
	roundsInCI  = 20
	roundsLong  = 500
	roundsLanes = 2
)

// Rounds of fio and writers of our own on a new volume (raw device, ext4 or xfs, 1 to 3 replicas) while its processes and those
// that look after it are killed and stopped at random: nobody sees an error, every acknowledged block is there after the next
// attachment, and the replicas that count as current are equal.
//
// Each round has a seed of its own: ROUNDS_SEED=seed ROUNDS=1 repeats one, ROUNDS=n or -long runs more.
func TestKillsAtRandomLoseNoAcknowledgedBlock(t *testing.T) {
	rounds := roundsInCI
	if *long {
		rounds = roundsLong
	}
	rounds = int(numberOf(t, "ROUNDS", int64(rounds)))
	first := numberOf(t, "ROUNDS_SEED", time.Now().UnixNano()/1000%1_000_000_000)
	t.Logf("%d rounds, seeds from %d", rounds, first)
	for l := range min(roundsLanes, rounds) {
		t.Run(fmt.Sprintf("lane %d", l+1), func(t *testing.T) {
			t.Parallel()
			lane := newLane(t)
			for n := l; n < rounds && !t.Failed(); n += roundsLanes {
				seed := first + int64(n)
				t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) { lane.round(t, seed) })
			}
		})
	}
}

// numberOf reads a number from the environment.
func numberOf(t *testing.T, variable string, otherwise int64) int64 {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	number, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatalf("%s is no number: %v", variable, err)
	}
	return number
}

// lane is an instance with images, on which one round at a time runs.
type lane struct {
	i      *instance
	images map[string]imageFile
	urls   map[string]string
}

// newLane starts an instance and downloads a raw image of ext4 and a qcow2 image of xfs to all of its disks.
func newLane(t *testing.T) *lane {
	t.Helper()
	xfs := xfsImage(t)
	l := &lane{i: ownInstance(t, 3), images: map[string]imageFile{"ext4": ext4Image(t, 64), "xfs": xfs}, urls: map[string]string{}}
	for name, image := range l.images {
		l.urls[name] = serve(t, image.path) + "/" + filepath.Base(image.path)
		l.i.apply(t, imageYAML(name, l.urls[name], image.checksum, 3))
	}
	for name := range l.images {
		until(t, l.i, 60*time.Second, "backingimage", name, "has three copies", func(o imageObject) bool { return len(readyCopies(o)) == 3 })
	}
	watchReasons(t, l.i)
	return l
}

// xfsImage makes an empty xfs, as compressed qcow2.
func xfsImage(t *testing.T) imageFile {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "xfs.raw")
	if err := os.WriteFile(raw, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	// The least that mkfs.xfs makes.
	if err := os.Truncate(raw, 300*mib); err != nil {
		t.Fatal(err)
	}
	must(t, "mkfs.xfs", "-q", raw)
	return imageFile{path: raw}.compressedQcow2(t)
}

// plan is what the seed of a round decides before it begins.
type plan struct {
	// mode is raw, ext4 or xfs.
	mode     string
	replicas int
	// burst: fio writes once, in bursts, and reads after the next attachment; otherwise it writes and reads all the time.
	burst bool
	// settled: the detachment waits until replicas that may differ were compared.
	settled bool
	blows   int
	nodes   [2]int
}

func newPlan(random *rand.Rand) plan {
	nodes := random.Perm(3)
	return plan{
		mode:     []string{"raw", "ext4", "xfs"}[random.Intn(3)],
		replicas: []int{1, 2, 3, 3}[random.Intn(4)],
		burst:    random.Intn(2) == 0,
		settled:  random.Intn(2) == 0,
		blows:    2 + random.Intn(3),
		nodes:    [2]int{nodes[0] + 1, nodes[1] + 1},
	}
}

// round is one volume from its creation to its end.
func (l *lane) round(t *testing.T, seed int64) {
	i, random := l.i, rand.New(rand.NewSource(seed))
	i.explainOnFailure(t)
	p := newPlan(random)
	t.Logf("repeat with ROUNDS_SEED=%d ROUNDS=1: %+v", seed, p)
	began := time.Now()

	image, capability, sizeMiB := "ext4", blockCapability(), int64(96)
	if p.mode != "raw" {
		image, capability = p.mode, mountCapability()
		capability.GetMount().FsType = p.mode
	}
	if image == "xfs" {
		sizeMiB = 320
	}
	request := createRequest(fmt.Sprintf("round-%d", seed), sizeMiB*mib, imageParameters(image, l.urls[image], l.images[image].checksum, p.replicas))
	request.VolumeCapabilities = []*csi.VolumeCapability{capability}
	request.Parameters["backingImageMinNumberOfCopies"] = "3"
	volume := createVolume(t, i, request)
	id := volume.VolumeId
	paths, withdraw := publishOnNode(t, i, volume, p.nodes[0], capability)
	untilRobust(t, i, id, "healthy")

	fioFile, fioAt, logFile, logAt := placesOf(p.mode, paths.target)
	blocks := startBlockLog(t, logFile, logAt, seed)
	blocks.goesOn(t, 20)
	args := fioArguments(fioFile, fioAt, seed)
	var run *fio
	if p.burst {
		run = startFio(t, append(slices.Clone(args), "--rw=randwrite", "--do_verify=0", "--thinktime=40ms", "--thinktime_blocks=16", "--fsync=50"))
	} else {
		run = startFio(t, append(slices.Clone(args), "--rw=randwrite", "--verify_backlog=64", "--time_based", "--runtime=2", "--fsync=50"))
	}
	storm := &storm{i: i, volume: id, random: random, blocks: blocks, alive: replicasOf(t, i, id)}
	storm.rage(t, p.blows)
	run.finish(t)
	blocks.goesOn(t, 20)
	blocks.halt(t)
	blocks.check(t)

	l.losses(t, id, p, storm.lost)
	if p.settled {
		untilEqual(t, i, id)
	}
	withdraw()
	untilState(t, i, id, "detached")
	l.compare(t, id, image, p.replicas-len(storm.lost), p.settled)

	paths, withdraw = publishOnNode(t, i, volume, p.nodes[1], capability)
	fioFile, fioAt, logFile, _ = placesOf(p.mode, paths.target)
	blocks.verify(t, logFile)
	if p.burst {
		args = fioArguments(fioFile, fioAt, seed)
		startFio(t, append(args, "--rw=randwrite", "--verify_only=1")).finish(t)
	}
	l.losses(t, id, p, storm.lost)
	untilEqual(t, i, id)
	withdraw()
	untilState(t, i, id, "detached")
	l.compare(t, id, image, p.replicas-len(storm.lost), true)
	t.Logf("%s; %d requests, the slowest took %s; the round took %s", strings.Join(storm.did, "; "),
		blocks.acknowledged.Load(), time.Duration(blocks.slowest.Load()), time.Since(began))
}

// placesOf says where fio and the writers of a round work: in files, or in two parts of the device, over and behind the image.
func placesOf(mode, target string) (fioFile string, fioAt int64, logFile string, logAt int64) {
	if mode == "raw" {
		return target, 56 * mib, target, 16 * mib
	}
	return filepath.Join(target, "fio"), 0, filepath.Join(target, "blocks"), 0
}

// losses: exactly the replicas that were killed have failed, and the volume says so; everybody else still counts.
func (l *lane) losses(t *testing.T, id string, p plan, lost []string) {
	t.Helper()
	eventually(t, 30*time.Second, "the lost replicas are marked, and no others", func() (bool, string) {
		replicas, err := tryList[replicaObject](l.i, "replica")
		if err != nil {
			return false, err.Error()
		}
		failed := []string{}
		for _, r := range replicas {
			if r.Spec.VolumeName == id && r.Spec.FailedAt != "" && r.Spec.FailedReason != "" {
				failed = append(failed, r.Metadata.Name)
			}
		}
		slices.Sort(failed)
		slices.Sort(lost)
		return slices.Equal(failed, lost), fmt.Sprintf("failed are %v, killed were %v", failed, lost)
	})
	if len(lost) == 0 {
		untilRobust(t, l.i, id, "healthy")
		return
	}
	v := until(t, l.i, 30*time.Second, "volume", id, "is degraded and says why", func(v volumeObject) bool {
		return v.Status.Robustness == "degraded" && says(conditionOf(v.Status.Conditions, "Ready").Message, lost)
	})
	if ready := conditionOf(v.Status.Conditions, "Ready"); ready.Reason != "Degraded" {
		t.Errorf("the reason of a degraded volume is %+v", ready)
	}
	mentions(t, "why", l.i.why("volume", id), append(slices.Clone(lost), "degraded", fmt.Sprintf("%d of %d", p.replicas-len(lost), p.replicas))...)
}

// untilEqual waits until no replica in use is being compared.
func untilEqual(t *testing.T, i *instance, id string) {
	t.Helper()
	until(t, i, 30*time.Second, "engine", engineOf(t, i, id).Metadata.Name, "has compared its replicas", func(e engineObject) bool {
		modes := e.Status.ReplicaModeMap
		for _, mode := range modes {
			if mode == "WO" {
				return false
			}
		}
		return len(modes) > 0 && e.Status.CurrentState == "running"
	})
}

// compare compares the replicas that count, when the attachment ended so that they must be equal. Those that were lost are behind, by their own records too.
func (l *lane) compare(t *testing.T, id, image string, wanted int, settled bool) {
	t.Helper()
	var good, lost []replicaObject
	for _, r := range replicasOf(t, l.i, id) {
		if r.Spec.FailedAt != "" {
			lost = append(lost, r)
			continue
		}
		until(t, l.i, 20*time.Second, "replica", r.Metadata.Name, "has stopped", func(r replicaObject) bool { return r.Status.CurrentState == "stopped" })
		good = append(good, r)
	}
	if len(good) != wanted {
		t.Fatalf("want %d replicas that count, found %+v", wanted, good)
	}
	unclean := false
	for _, r := range good {
		record := r.record(t)
		unclean = unclean || !record.Clean
		for _, other := range lost {
			if behind := other.record(t); behind.Generation >= record.Generation || slices.Contains(record.Members, other.Metadata.Name) {
				t.Errorf("%s was lost, but its record %+v is not behind %+v", other.Metadata.Name, behind, record)
			}
		}
	}
	if unclean && settled {
		t.Errorf("an attachment that ended well left records that are not clean: %+v", good)
	}
	if !unclean || settled {
		replicasAreEqual(t, l.i, good, get[imageObject](t, l.i, "backingimage", image))
	}
}
