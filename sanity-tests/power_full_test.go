package sanitytests

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// A replica that cannot record a generation for want of room refuses it with the reason, and keeps what it had recorded.
func TestAFullDiskRefusesAGenerationAndKeepsTheLastOne(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			m := newMachine(t, "disk")
			m.makeDisk(t, 0, kind)
			m.Disks = []string{m.path("dev0")}
			if output, err := isolated(m, m.Work, "TestPowerFullDisk"); err != nil {
				t.Errorf("%v\n%s", err, output)
			}
		})
	}
}

// TestPowerFullDisk is the machine with the full disk; alone it does nothing.
func TestPowerFullDisk(t *testing.T) {
	m := thisMachine(t)
	mountDisk(t, m.Disks[0], m.Points[0])
	r := m.startReplica(t)
	export := r.open(t, 1)
	r.write(t, export, 0, true)
	before, err := os.ReadFile(filepath.Join(r.dir, "replica.json"))
	if err != nil {
		t.Fatal(err)
	}
	fillDisk(t, m.Points[0])

	reply := r.tell(t, `{"request":"fence","generation":2,"members":[%q],"export":%q}`, replicaName, export)
	if reply.Reply != "refused" {
		t.Fatalf("a generation was accepted on a full disk: %+v", reply)
	}
	mentions(t, "the refusal", reply.Message, "replica.json", "no space left")
	after, err := os.ReadFile(filepath.Join(r.dir, "replica.json"))
	if err != nil || string(after) != string(before) {
		t.Errorf("the record changed from `%s` to `%s` (%v)", before, after, err)
	}
	if left, _ := filepath.Glob(filepath.Join(r.dir, "*.writing")); len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
	// With room again it goes on where it was.
	if err := os.Remove(filepath.Join(m.Points[0], filler)); err != nil {
		t.Fatal(err)
	}
	r.ask(t, `{"request":"fence","generation":2,"members":[%q],"export":%q}`, replicaName, export)
	r.ask(t, `{"request":"close","generation":2}`)
}

const filler = "filler"

// fillDisk leaves no room, down to the last block.
func fillDisk(t *testing.T, point string) {
	t.Helper()
	file, err := os.Create(filepath.Join(point, filler))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for piece := mib; piece >= 512; piece /= 2 {
		for err = nil; err == nil; {
			_, err = file.Write(make([]byte, piece))
			if err == nil && piece < mib {
				// What is only in memory has no room yet.
				err = file.Sync()
			}
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
}
