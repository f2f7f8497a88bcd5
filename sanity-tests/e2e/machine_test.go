// What the cluster could leave on the machine.
package e2e

import (
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// loops are the loop devices of files that the driver's pods see; other tests on this machine have others.
func loops() (found []string) {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // detached meanwhile
		}
		behind := strings.TrimSpace(string(text))
		for _, folder := range []string{"/var/lib/backing-image-csi/", "/var/lib/longhorn/", "/var/lib/kubelet/"} {
			if strings.HasPrefix(behind, folder) {
				found = append(found, strings.Split(file, "/")[3]+": "+behind)
			}
		}
	}
	return found
}

// inventory is what our processes could leave outside of the cluster's own folders.
func inventory() (found []string) {
	found = loops()
	processes, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, file := range processes {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it ended meanwhile
		}
		// Only those of the cluster's nodes; others may run tests of their own.
		groups, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cgroup"))
		if err != nil || !strings.Contains(string(groups), "/bicluster-") {
			continue
		}
		switch name := strings.TrimSpace(string(text)); name {
		case "qemu-storage-daemon", "qemu-storage-da", "backing-image-c", "backing-image-csi":
			found = append(found, "process "+filepath.Base(filepath.Dir(file))+" "+name)
		}
	}
	sort.Strings(found)
	return found
}
