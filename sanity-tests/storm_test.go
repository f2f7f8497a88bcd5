package sanitytests

import (
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// storm kills and stops processes of an instance at random while a volume of it is written.
//
// A kill of the standalone process stands for one of controller, CSI controller, node plugin and instance manager: they are one process there.
type storm struct {
	i      *instance
	volume string
	random *rand.Rand
	blocks *blockLog
	// alive are the replicas that were not killed yet, lost the names of the others.
	alive []replicaObject
	lost  []string
	// did says what happened, for people.
	did []string
}

// rage strikes a number of times, each time after a random number of acknowledged requests, and leaves an instance that runs.
func (s *storm) rage(t *testing.T, blows int) {
	t.Helper()
	for range blows {
		s.blocks.goesOn(t, s.random.Int63n(300))
		s.blow(t)
	}
	s.blocks.goesOn(t, 20)
}

// blow strikes once, or twice at once.
func (s *storm) blow(t *testing.T) {
	t.Helper()
	switch s.random.Intn(8) {
	case 0, 1:
		s.killEngine(t)
	case 2, 3:
		s.killReplica(t)
	case 4:
		s.withoutInstance(t)
	case 5:
		s.stopSomething(t)
	case 6:
		s.killAgent(t)
	case 7:
		// Two at once: a replica just before the engine, so that a fence may be half done.
		s.killReplica(t)
		s.killEngine(t)
	}
}

// withoutInstance kills the standalone process and starts it again; mostly something else dies meanwhile.
func (s *storm) withoutInstance(t *testing.T) {
	t.Helper()
	s.did = append(s.did, "killed the standalone process")
	s.i.kill(t)
	switch s.random.Intn(4) {
	case 0:
		s.killEngine(t)
	case 1:
		s.killReplica(t)
	case 2:
		s.killAgent(t)
	}
	s.blocks.goesOn(t, s.random.Int63n(100))
	s.i.restart(t)
}

// killEngine kills the engine under its holder.
func (s *storm) killEngine(t *testing.T) {
	t.Helper()
	// Between two engines there is none.
	var engine process
	eventually(t, 10*time.Second, "an engine runs", func() (bool, string) {
		engines := s.roles("engine")
		if len(engines) == 1 {
			engine = engines[0]
		}
		return len(engines) == 1, fmt.Sprint(engines)
	})
	s.did = append(s.did, "killed the engine")
	killProcess(t, engine.pid)
}

// killReplica kills a replica's process or its qemu-storage-daemon, unless it is the last one.
func (s *storm) killReplica(t *testing.T) {
	t.Helper()
	if len(s.alive) < 2 {
		return
	}
	n := s.random.Intn(len(s.alive))
	victim := s.alive[n]
	s.alive = slices.Delete(slices.Clone(s.alive), n, n+1)
	s.lost = append(s.lost, victim.Metadata.Name)
	if s.random.Intn(2) == 0 {
		s.did = append(s.did, "killed the storage daemon of "+victim.Metadata.Name)
		killStorageDaemon(t, victim)
		return
	}
	s.did = append(s.did, "killed the process of "+victim.Metadata.Name)
	killReplicaProcess(t, victim)
}

// killAgent kills the process that owns the image files of a disk.
func (s *storm) killAgent(t *testing.T) {
	t.Helper()
	found := slices.DeleteFunc(processesOf(s.i.dir), func(p process) bool { return !slices.Contains(p.args, "backing-image-manager") })
	if len(found) == 0 {
		return
	}
	s.did = append(s.did, "killed an agent")
	killProcess(t, found[s.random.Intn(len(found))].pid)
}

// stopSomething stops a process for a time that is below every limit, so that nobody is given up for it.
func (s *storm) stopSomething(t *testing.T) {
	t.Helper()
	found := append(s.roles("engine"), s.roles("engine-holder")...)
	found = append(found, process{pid: s.i.daemon.Process.Pid, args: []string{"", "standalone"}})
	for _, r := range s.alive {
		found = append(found, processesOf(r.dir())...)
	}
	victim := found[s.random.Intn(len(found))]
	pause := time.Duration(20+s.random.Intn(800)) * time.Millisecond
	s.did = append(s.did, fmt.Sprintf("stopped %s for %s", strings.Join(victim.args[:min(2, len(victim.args))], " "), pause))
	if err := syscall.Kill(victim.pid, syscall.SIGSTOP); err != nil {
		t.Fatalf("cannot stop %s: %v", victim, err)
	}
	t.Cleanup(func() { syscall.Kill(victim.pid, syscall.SIGCONT) })
	if s.random.Intn(2) == 0 && !slices.Contains(victim.args, "engine") {
		s.killEngine(t)
	}
	// Not a wait: it is the stop that is tested, and nothing happens at its end.
	time.Sleep(pause)
	// A holder may have replaced an engine that was silent.
	if err := syscall.Kill(victim.pid, syscall.SIGCONT); err != nil && !slices.Contains(victim.args, "engine") {
		t.Fatalf("cannot continue %s: %v", victim, err)
	}
}

// roles are the processes of one role that work for the volume.
func (s *storm) roles(role string) []process {
	return slices.DeleteFunc(processesOf(s.i.path("nodes")), func(p process) bool {
		return len(p.args) < 2 || p.args[1] != role || !strings.Contains(p.String(), s.volume)
	})
}

// killReplicaProcess kills our process beside the qemu-storage-daemon of a replica.
func killReplicaProcess(t *testing.T, r replicaObject) {
	t.Helper()
	for _, p := range processesOf(r.dir()) {
		if len(p.args) > 1 && p.args[1] == "replica" {
			killProcess(t, p.pid)
			return
		}
	}
	t.Fatalf("no replica process has files of %s open; processes there: %v", r.dir(), processesOf(r.dir()))
}
