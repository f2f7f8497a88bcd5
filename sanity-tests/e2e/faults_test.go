// What a cluster does to a driver: processes that are killed, kubelets that stop, nodes that are gone.
package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ours are the driver's pods of a component, on a node or on all.
func ours(t *testing.T, component, node string) []corev1.Pod {
	t.Helper()
	options := metav1.ListOptions{LabelSelector: component}
	if node != "" {
		options.FieldSelector = "spec.nodeName=" + node
	}
	found, err := c.kube.CoreV1().Pods(system).List(context.Background(), options)
	must(t, err)
	return found.Items
}

const (
	controllers = "app.kubernetes.io/component=controller"
	nodePlugins = "app.kubernetes.io/component=node"
	agents      = "longhorn.io/component in (backing-image-manager, backing-image-data-source)"
)

// kill ends a pod as if its machine lost power for a moment: at once, without asking it.
func kill(t *testing.T, pod corev1.Pod) {
	t.Helper()
	now := int64(0)
	must(t, c.kube.CoreV1().Pods(pod.Namespace).Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}))
}

// leader is the pod that reconciles.
func leader(t *testing.T) corev1.Pod {
	t.Helper()
	lease, err := c.kube.CoordinationV1().Leases(system).Get(t.Context(), "backing-image-csi-controller", metav1.GetOptions{})
	must(t, err)
	if lease.Spec.HolderIdentity == nil {
		t.Fatal("nobody leads")
	}
	name, _, _ := strings.Cut(*lease.Spec.HolderIdentity, "_")
	found, err := c.kube.CoreV1().Pods(system).Get(t.Context(), name, metav1.GetOptions{})
	must(t, err)
	return *found
}

func waitDriver(t *testing.T) {
	t.Helper()
	eventually(t, "driver ready", 2*time.Minute, c.driverReady)
}

func TestLeaderThatIsKilledWhileItProvisionsIsReplaced(t *testing.T) {
	flow(t)
	image := newImage(t, 64)
	apply(t, image.class("takeover", "takeover", 2))
	t.Cleanup(func() { remove(t, object("longhorn.io/v1beta2", "BackingImage", system, "takeover")) })
	first := leader(t)
	apply(t, claimOf("takeover", "takeover", "Filesystem", "ReadWriteOnce", 96))
	apply(t, podOf("takeover", "takeover", "", false))
	eventually(t, "image of the class exists", time.Minute, func() string {
		if _, err := c.get(t.Context(), "backingimages.longhorn.io", system, "takeover"); err != nil {
			return err.Error()
		}
		return ""
	})
	kill(t, first)
	waitRunning(t, "takeover")
	if next := leader(t); next.UID == first.UID {
		t.Errorf("%s still leads, which was killed", first.Name)
	}
	hasImage(t, "takeover")
	waitDriver(t)
}

func TestEveryOtherPodOfOursIsReplacedWhileAPodWrites(t *testing.T) {
	flow(t)
	image := newImage(t, 32)
	image.copies = 2
	apply(t, image.manifest("writer"))
	waitImageReady(t, "writer")
	apply(t, image.class("writer", "writer", 2))
	apply(t, claimOf("writer", "writer", "Filesystem", "ReadWriteOnce", 64))
	apply(t, writerOf("writer", "writer", "n1"))
	waitRunning(t, "writer")
	for _, kind := range []string{agents, nodePlugins, controllers} {
		before := ours(t, kind, "")
		for _, one := range before {
			kill(t, one)
		}
		if kind != agents {
			waitDriver(t)
		}
		writesOn(t, "writer")
	}
	stopWriter(t, "writer")
}

// lines are how many numbers a writer has written.
func lines(t *testing.T, writer string) int {
	t.Helper()
	count, err := strconv.Atoi(in(t, writer, "cat /data/log 2>/dev/null | wc -l"))
	must(t, err)
	return count
}

func writesOn(t *testing.T, writer string) {
	t.Helper()
	seen := lines(t, writer)
	eventually(t, "the pod writes on", 30*time.Second, func() string {
		if now := lines(t, writer); now == seen {
			return fmt.Sprintf("still %d lines", now)
		}
		return ""
	})
}

// stopWriter ends the writing: each number must be there, and no write may have failed.
func stopWriter(t *testing.T, writer string) {
	t.Helper()
	in(t, writer, "touch /tmp/stop")
	eventually(t, "the writer has ended", 30*time.Second, func() string {
		if _, err := tryIn(t.Context(), "default", writer, "", "test -e /tmp/last"); err != nil {
			return err.Error()
		}
		return ""
	})
	if failed := in(t, writer, "cat /tmp/failed 2>/dev/null || true"); failed != "" {
		t.Errorf("these writes failed: %s", failed)
	}
	last := in(t, writer, "cat /tmp/last")
	hasWritten(t, writer, last)
}

// hasWritten: a writer's log, seen by a pod, is every number up to the last one.
func hasWritten(t *testing.T, pod, last string) {
	t.Helper()
	if all := in(t, pod, "seq 1 "+last+" | cmp - /data/log && echo same"); all != "same" {
		t.Errorf("the log is not 1 to %s: %s", last, all)
	}
}

func TestManagerPodThatIsKilledDuringASyncGoesOn(t *testing.T) {
	flow(t)
	image := newImage(t, 256)
	apply(t, image.manifest("synced"))
	waitImageReady(t, "synced")
	resource, err := c.resource("backingimages.longhorn.io")
	must(t, err)
	_, err = c.dynamic.Resource(resource).Namespace(system).Patch(t.Context(), "synced", types.MergePatchType,
		[]byte(`{"spec": {"minNumberOfCopies": 2}}`), metav1.PatchOptions{})
	must(t, err)
	eventually(t, "a second manager", time.Minute, func() string {
		if found := ours(t, "longhorn.io/component=backing-image-manager", ""); len(found) < 2 {
			return fmt.Sprintf("there are %d", len(found))
		}
		return ""
	})
	for _, one := range ours(t, "longhorn.io/component=backing-image-manager", "") {
		kill(t, one)
	}
	eventually(t, "two ready copies", 3*time.Minute, func() string {
		found, err := c.get(t.Context(), "backingimages.longhorn.io", system, "synced")
		if err != nil {
			return err.Error()
		}
		copies, _ := found.Object["status"].(map[string]any)["diskFileStatusMap"].(map[string]any)
		ready, text := 0, fmt.Sprint(copies)
		for _, one := range copies {
			if one, ok := one.(map[string]any); ok && one["state"] == "ready" {
				ready++
			}
		}
		if ready < 2 {
			return text
		}
		return ""
	})
}

func TestKubeletThatStopsForAWhileFindsItsVolumesAgain(t *testing.T) {
	flow(t)
	image := newImage(t, 32)
	apply(t, image.manifest("kubelet"))
	apply(t, image.class("kubelet", "kubelet", 1))
	apply(t, claimOf("kubelet", "kubelet", "Filesystem", "ReadWriteOnce", 64))
	apply(t, podOf("kubelet", "kubelet", "n2", false))
	waitRunning(t, "kubelet")
	in(t, "kubelet", "echo before > /data/mark && sync")
	must(t, c.script("kubelet-stop", "2"))
	t.Cleanup(func() { must(t, c.script("kubelet-start", "2")) })
	eventually(t, "node n2 not ready", time.Minute, func() string { return nodeIs("n2", corev1.ConditionTrue) })
	must(t, c.script("kubelet-start", "2"))
	waitNodeReady(t, "n2")
	waitRunning(t, "kubelet")
	if found := in(t, "kubelet", "cat /data/mark"); found != "before" {
		t.Errorf("the pod reads %q, it wrote `before`", found)
	}
}

func waitNodeReady(t *testing.T, name string) {
	t.Helper()
	eventually(t, "node "+name+" ready", time.Minute, func() string {
		if nodeIs(name, corev1.ConditionTrue) == "" {
			return "it is not"
		}
		return ""
	})
}

// nodeIs says that a node's Ready condition has that status; nothing when it has another one.
func nodeIs(name string, status corev1.ConditionStatus) string {
	node, err := c.kube.CoreV1().Nodes().Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		return err.Error()
	}
	for _, one := range node.Status.Conditions {
		if one.Type == corev1.NodeReady && one.Status == status {
			return fmt.Sprintf("it is %s: %s", status, one.Message)
		}
	}
	return ""
}
