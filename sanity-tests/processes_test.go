package sanitytests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// process is one running process, as /proc shows it.
type process struct {
	pid  int
	name string
	args []string
}

func (p process) String() string { return fmt.Sprintf("%d %s", p.pid, strings.Join(p.args, " ")) }

// processesOf finds the processes that have a directory in their arguments, or a file below it open.
func processesOf(dir string) []process {
	entries, _ := filepath.Glob("/proc/[0-9]*")
	var found []process
	for _, entry := range entries {
		pid, _ := strconv.Atoi(filepath.Base(entry))
		cmdline, err := os.ReadFile(entry + "/cmdline")
		if err != nil || len(cmdline) == 0 || pid == os.Getpid() {
			continue
		}
		if !strings.Contains(string(cmdline), dir) && !hasOpen(entry, dir) {
			continue
		}
		name, _ := os.ReadFile(entry + "/comm")
		args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		found = append(found, process{pid: pid, name: strings.TrimSpace(string(name)), args: args})
	}
	return found
}

func hasOpen(proc, dir string) bool {
	descriptors, _ := filepath.Glob(proc + "/fd/*")
	return slices.ContainsFunc(descriptors, func(descriptor string) bool {
		target, err := os.Readlink(descriptor)
		return err == nil && strings.HasPrefix(target, dir+"/")
	})
}

// dataPlane is the pids of the processes that carry I/O: replicas, their qemu-storage-daemons, holders and engines.
func dataPlane(i *instance) []int {
	var pids []int
	for _, p := range processesOf(i.dir) {
		role := len(p.args) > 1 && slices.Contains([]string{"replica", "engine-holder", "engine"}, p.args[1])
		if role || isStorageDaemon(p) {
			pids = append(pids, p.pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// isStorageDaemon: the kernel cuts names after 15 characters.
func isStorageDaemon(p process) bool { return strings.HasPrefix(p.name, "qemu-storage-da") }

// killStorageDaemon kills the qemu-storage-daemon of one replica.
func killStorageDaemon(t *testing.T, replica replicaObject) {
	t.Helper()
	killProcess(t, storageDaemon(t, replica))
}

// storageDaemon is the qemu-storage-daemon of one replica.
func storageDaemon(t *testing.T, replica replicaObject) int {
	t.Helper()
	dir := replica.dir()
	for _, p := range processesOf(dir) {
		if isStorageDaemon(p) {
			return p.pid
		}
	}
	t.Fatalf("no qemu-storage-daemon has files of %s open; processes there: %v", dir, processesOf(dir))
	return 0
}

func killProcess(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatalf("cannot kill %d: %v", pid, err)
	}
}

// leftovers lists processes, mounts and loop devices of a directory.
func leftovers(dir string) []string {
	var rest []string
	for _, p := range processesOf(dir) {
		rest = append(rest, "process "+p.String())
	}
	for _, point := range mountsBelow(dir) {
		rest = append(rest, "mount "+point)
	}
	for _, device := range loopDevices(dir) {
		rest = append(rest, "loop device "+device)
	}
	return rest
}

// mountsBelow lists mount points below a directory and mounts of devices whose file is below it.
func mountsBelow(dir string) []string {
	content, _ := os.ReadFile("/proc/self/mountinfo")
	devices := loopDevices(dir)
	var points []string
	for _, line := range strings.Split(string(content), "\n") {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 5 || dash+2 >= len(fields) {
			continue
		}
		if strings.HasPrefix(fields[4], dir) || slices.Contains(devices, fields[dash+2]) {
			points = append(points, fields[4])
		}
	}
	return points
}

// loopDevices lists loop devices whose file is below a directory.
func loopDevices(dir string) []string {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	var devices []string
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err == nil && strings.HasPrefix(string(content), dir) {
			devices = append(devices, "/dev/"+strings.Split(file, "/")[3])
		}
	}
	return devices
}

// cleanUp removes by force what a failed test left, so that the next run starts clean.
func cleanUp(dir string) {
	points := mountsBelow(dir)
	slices.Reverse(points)
	for _, p := range processesOf(dir) {
		syscall.Kill(p.pid, syscall.SIGKILL)
	}
	for _, point := range points {
		syscall.Unmount(point, syscall.MNT_DETACH)
	}
	for _, device := range loopDevices(dir) {
		exec.Command("losetup", "-d", device).Run()
	}
}
