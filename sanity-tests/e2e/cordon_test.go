// A node that is cordoned, as `kubectl drain` begins.
package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
)

// cordon does what `kubectl cordon` and `kubectl uncordon` do.
func cordon(t *testing.T, node string, closed bool) {
	t.Helper()
	text := fmt.Sprintf(`{"spec": {"unschedulable": %t}}`, closed)
	_, err := c.kube.CoreV1().Nodes().Patch(context.Background(), node, types.MergePatchType, []byte(text), metav1.PatchOptions{})
	must(t, err)
}

// patch changes an object of ours as `kubectl patch --type merge` does.
func patch(t *testing.T, kind, name, text string) {
	t.Helper()
	resource, err := c.resource(kind + ".longhorn.io")
	must(t, err)
	client := c.dynamic.Resource(resource).Namespace(system)
	_, err = client.Patch(context.Background(), name, types.MergePatchType, []byte(text), metav1.PatchOptions{})
	must(t, err)
}

// says waits until a condition of an object of ours says all of that; without words, until there is no such condition.
func says(t *testing.T, kind, name, condition string, words ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s %s says %v as %s", kind, name, words, condition), 30*time.Second, func() string {
		found, why := told(t, kind, name, condition)
		missing := func(word string) bool { return !strings.Contains(why, word) }
		if len(words) == 0 && found || slices.ContainsFunc(words, missing) {
			return why
		}
		return ""
	})
}

// told is whether an object of ours has a condition, and what that says.
func told(t *testing.T, kind, name, of string) (found bool, why string) {
	t.Helper()
	object, err := c.get(t.Context(), kind+".longhorn.io", system, name)
	must(t, err)
	status, why := condition(object, of)
	return status != "", why
}

// copiesOn waits until an image has ready copies on just these nodes, one on each, and nothing of it elsewhere.
func copiesOn(t *testing.T, image string, nodes ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the copies of %s are on %v", image, nodes), time.Minute, func() string {
		if found := copiesOf(t, image); !slices.Equal(found, nodes) {
			return fmt.Sprintf("they are on %v", found)
		}
		return ""
	})
}

// copiesOf are the nodes of an image's copies in order, with the state of those that are not ready.
func copiesOf(t *testing.T, image string) (found []string) {
	t.Helper()
	node := map[string]string{}
	all, err := c.list(t.Context(), "nodes.longhorn.io", system)
	must(t, err)
	for _, one := range all {
		disks, _, _ := unstructured.NestedMap(one.Object, "status", "diskStatus")
		for _, disk := range disks {
			uuid, _, _ := unstructured.NestedString(disk.(map[string]any), "diskUUID")
			node[uuid] = one.GetName()
		}
	}
	object, err := c.get(t.Context(), "backingimages.longhorn.io", system, image)
	must(t, err)
	copies, _, _ := unstructured.NestedMap(object.Object, "status", "diskFileStatusMap")
	for disk, one := range copies {
		where := node[disk]
		if state, _, _ := unstructured.NestedString(one.(map[string]any), "state"); state != "ready" {
			where += " " + state
		}
		found = append(found, where)
	}
	slices.Sort(found)
	return found
}

// A cordoned node gets nothing new. Its copies stay, or leave it when the setting says so; one that may not leave says why. Nothing
// of that is left once the node is uncordoned.
func TestCordonedNodeIsClosedOrEmptiedBySettings(t *testing.T) {
	flow(t)
	image := newImage(t, 16)
	image.copies = 2
	apply(t, image.manifest("kept"))
	copiesOn(t, "kept", "n1", "n2")
	t.Cleanup(func() {
		cordon(t, "n2", false)
		patch(t, "settings", "backing-image-cordoned-node-policy", `{"value": "ignore"}`)
	})

	cordon(t, "n2", true)
	says(t, "nodes", "n2", "Cordoned", "n2 unschedulable")
	apply(t, image.manifest("late"))
	copiesOn(t, "late", "n1")
	says(t, "backingimages", "late", "Ready", "FewerCopies", "disable-scheduling-on-cordoned-node")
	if found, why := told(t, "backingimages", "kept", "Evicted"); found || !slices.Equal(copiesOf(t, "kept"), []string{"n1", "n2"}) {
		t.Errorf("want both copies where they were: %v; %s", copiesOf(t, "kept"), why)
	}

	patch(t, "settings", "backing-image-cordoned-node-policy", `{"value": "evict"}`)
	stays := []string{"EvictionBlocked", "of n2 stays, although its node is cordoned"}
	says(t, "backingimages", "kept", "Evicted", stays...)
	cordon(t, "n2", false)
	says(t, "nodes", "n2", "Cordoned")
	says(t, "backingimages", "kept", "Evicted")
	copiesOn(t, "kept", "n1", "n2")
	copiesOn(t, "late", "n1", "n2")

	cordon(t, "n2", true)
	says(t, "backingimages", "kept", "Evicted", stays...)
	patch(t, "backingimages", "kept", `{"spec": {"minNumberOfCopies": 1}}`)
	copiesOn(t, "kept", "n1")
	says(t, "backingimages", "kept", "Evicted")
	says(t, "backingimages", "late", "Evicted", stays...)
}
