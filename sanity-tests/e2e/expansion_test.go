// Claims that are edited to be larger.
package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const oldMiB, newMiB = 64, 256

// request edits what a claim asks for.
func request(t *testing.T, name string, sizeMiB int) error {
	t.Helper()
	patch := fmt.Sprintf(`{"spec": {"resources": {"requests": {"storage": "%dMi"}}}}`, sizeMiB)
	_, err := c.kube.CoreV1().PersistentVolumeClaims("default").Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

// has says why a claim does not have that capacity.
func has(t *testing.T, name string, sizeMiB int) string {
	t.Helper()
	want := resource.MustParse(fmt.Sprintf("%dMi", sizeMiB))
	if capacity := claim(t, name).Status.Capacity[corev1.ResourceStorage]; capacity.Cmp(want) != 0 {
		return fmt.Sprintf("it has %s, want %s; %s", capacity.String(), want.String(), strings.Join(eventsOf(t, "default", "PersistentVolumeClaim", name), "; "))
	}
	return ""
}

func claimCondition(t *testing.T, name string, kind corev1.PersistentVolumeClaimConditionType) bool {
	t.Helper()
	for _, one := range claim(t, name).Status.Conditions {
		if one.Type == kind && one.Status == corev1.ConditionTrue {
			return true
		}
	}
	return false
}

// bytesIn runs a command in a pod that prints a number.
func bytesIn(t *testing.T, pod, command string) int {
	t.Helper()
	text := in(t, pod, command)
	number, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Fatalf("%s in pod %s says %q", command, pod, text)
	}
	return number
}

// A claim that is edited while a pod uses it says that it waits, and has its new size with all of its old bytes in the next pod.
func TestExpansion(t *testing.T) {
	flow(t)
	image := newImage(t, 32)
	image.copies = 2
	apply(t, image.manifest("growing"))
	waitImageReady(t, "growing")
	apply(t, image.class("growing", "growing", 2))
	for _, one := range []struct{ mode, write, sum, size string }{
		{
			"Filesystem", "dd if=/dev/urandom of=/data/old bs=1M count=8 2>/dev/null && sync", "sha512sum /data/old",
			"stat -f -c '%b %S' /data | { read blocks size; echo $((blocks * size)); }",
		},
		{
			"Block", "dd if=/dev/urandom of=/dev/volume bs=1M seek=40 count=24 conv=fsync 2>/dev/null",
			fmt.Sprintf("head -c %d /dev/volume | sha512sum", oldMiB<<20), "wc -c </dev/volume",
		},
	} {
		t.Run(one.mode, func(t *testing.T) {
			name := "growing-" + strings.ToLower(one.mode)
			block := one.mode == "Block"
			apply(t, claimOf(name, "growing", one.mode, "ReadWriteOnce", oldMiB))
			apply(t, podOf(name+"-1", name, "n1", block))
			waitRunning(t, name+"-1")
			in(t, name+"-1", one.write)
			sum := in(t, name+"-1", one.sum)
			if size := bytesIn(t, name+"-1", one.size); size > oldMiB<<20 {
				t.Fatalf("it has %d bytes before it grew", size)
			}

			must(t, request(t, name, newMiB))
			waitEvent(t, "default", "PersistentVolumeClaim", name, "VolumeResizeFailed", "attached to node `n1`", "once it is detached")
			if why := has(t, name, oldMiB); why != "" {
				t.Errorf("while the pod runs: %s", why)
			}
			if again := in(t, name+"-1", one.sum); again != sum {
				t.Error("the pod that waits for the growth reads something else")
			}
			remove(t, object("v1", "Pod", "default", name+"-1"))
			eventually(t, "claim "+name+" is expanded", 3*time.Minute, func() string {
				if claimCondition(t, name, corev1.PersistentVolumeClaimFileSystemResizePending) {
					return ""
				}
				return strings.Join(eventsOf(t, "default", "PersistentVolumeClaim", name), "; ")
			})

			apply(t, podOf(name+"-2", name, "n2", block))
			waitRunning(t, name+"-2")
			size := bytesIn(t, name+"-2", one.size)
			if block && size != newMiB<<20 || !block && size < newMiB<<20*8/10 {
				t.Errorf("the next pod has %d bytes, the claim asked for %d MiB", size, newMiB)
			}
			if again := in(t, name+"-2", one.sum); again != sum {
				t.Error("what was written before is not what is there after the growth")
			}
			if block {
				command := fmt.Sprintf("tail -c +%d /dev/volume | tr -d '\\000' | wc -c", oldMiB<<20+1)
				if rest := bytesIn(t, name+"-2", command); rest != 0 {
					t.Errorf("%d bytes of what is new are not zero", rest)
				}
			} else {
				hasImage(t, name+"-2")
			}
			eventually(t, "claim "+name+" has its new capacity", time.Minute, func() string { return has(t, name, newMiB) })
			if claimCondition(t, name, corev1.PersistentVolumeClaimFileSystemResizePending) {
				t.Error("the claim has grown and still waits for its filesystem")
			}
			if err := request(t, name, oldMiB); err == nil {
				t.Error("a claim was edited to be smaller than it is")
			}
		})
	}
}
