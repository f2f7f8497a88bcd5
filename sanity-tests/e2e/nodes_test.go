// A node that is gone, and what its user declares of it.
package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const outOfService = "node.kubernetes.io/out-of-service"

// taint declares that nothing of a node runs any more, or takes that back.
func taint(t *testing.T, node string, off bool) {
	t.Helper()
	text := `{"spec": {"taints": null}}`
	if off {
		text = `{"spec": {"taints": [{"key": "` + outOfService + `", "value": "nodeshutdown", "effect": "NoExecute"}]}}`
	}
	_, err := c.kube.CoreV1().Nodes().Patch(context.Background(), node, types.MergePatchType, []byte(text), metav1.PatchOptions{})
	must(t, err)
}

// What a pod wrote on a node that is gone is there on the next one, once the user has declared that the first one is off.
// It may live on, behind a cut network or with a kubelet that is dead: whatever it still writes harms nobody.
func TestVolumeOfANodeThatIsOutOfServiceIsAttachedElsewhere(t *testing.T) {
	for _, one := range []struct{ name, lose, back string }{
		{"kubelet stopped", "kubelet-stop", "kubelet-start"},
		{"network cut", "cut", "mend"},
	} {
		t.Run(one.name, func(t *testing.T) {
			flow(t)
			image := newImage(t, 16)
			image.copies = 2
			apply(t, image.manifest("gone"))
			waitImageReady(t, "gone")
			apply(t, image.class("gone", "gone", 2))
			apply(t, claimOf("gone", "gone", "Filesystem", "ReadWriteOnce", 32))
			waitBound(t, "gone")
			volume := claim(t, "gone").Spec.VolumeName
			apply(t, writerOf("lost", "gone", "n2"))
			waitRunning(t, "lost")
			writesOn(t, "lost")
			written := lines(t, "lost")

			must(t, c.script(one.lose, "2"))
			isLost := true
			bringBack := func() {
				if isLost {
					isLost = false
					must(t, c.script(one.back, "2"))
				}
			}
			t.Cleanup(func() {
				bringBack()
				taint(t, "n2", false)
				waitDriver(t)
			})
			eventually(t, "node n2 not ready", time.Minute, func() string { return nodeIs("n2", corev1.ConditionTrue) })
			eventually(t, "the volume says why it waits", time.Minute, func() string {
				found, err := c.get(t.Context(), "volumes.longhorn.io", system, volume)
				must(t, err)
				_, why := condition(found, "Ready")
				if !strings.Contains(why, "NodeNotReady") || !strings.Contains(why, "n2") {
					return why
				}
				t.Log(why)
				return ""
			})
			taint(t, "n2", true)
			eventually(t, "pod lost is gone", 2*time.Minute, func() string {
				found, err := c.kube.CoreV1().Pods("default").Get(t.Context(), "lost", metav1.GetOptions{})
				if apierrors.IsNotFound(err) {
					return ""
				}
				must(t, err)
				return fmt.Sprint("it is ", found.Status.Phase)
			})
			apply(t, podOf("next", "gone", "n1", false))
			waitRunning(t, "next")
			count := lines(t, "next")
			if count < written {
				t.Errorf("%d numbers were written, %d are there", written, count)
			}
			hasWritten(t, "next", fmt.Sprint(count))
			in(t, "next", "echo here > /data/after && sync")

			bringBack()
			waitNodeReady(t, "n2")
			taint(t, "n2", false)
			waitDriver(t)
			if after := in(t, "next", "cat /data/after"); after != "here" {
				t.Errorf("the pod reads %q", after)
			}
		})
	}
}
