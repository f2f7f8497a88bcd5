// The YAML of the documents, and the ways to a volume.
package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
)

// tagged gives every node and disk the tags that the documents' YAML asks for, and lets all of the disk be used: 30 % of this
// machine's filesystem may be more than is free on it.
func tagged(t *testing.T) {
	t.Helper()
	for n := 1; n <= nodes; n++ {
		name := fmt.Sprintf("n%d", n)
		node, err := c.get(t.Context(), "nodes.longhorn.io", system, name)
		must(t, err)
		disks, _, _ := unstructured.NestedMap(node.Object, "spec", "disks")
		var patch []string
		for disk := range disks {
			patch = append(patch, fmt.Sprintf(`%q: {"tags": ["disk1"], "storageReserved": 0}`, disk))
		}
		text := fmt.Sprintf(`{"spec": {"tags": ["node1"], "disks": {%s}}}`, strings.Join(patch, ","))
		resource, err := c.resource("nodes.longhorn.io")
		must(t, err)
		_, err = c.dynamic.Resource(resource).Namespace(system).Patch(t.Context(), name, types.MergePatchType, []byte(text), metav1.PatchOptions{})
		must(t, err)
	}
}

func waitImageReady(t *testing.T, name string) {
	t.Helper()
	eventually(t, "image "+name+" ready", 2*time.Minute, func() string {
		found, err := c.get(t.Context(), "backingimages.longhorn.io", system, name)
		if err != nil {
			return err.Error()
		}
		if status, why := condition(found, "Ready"); status != "True" {
			return why
		}
		return ""
	})
}

// nothingLeft: no object, no pod of an agent that has no work, no loop device, no mount.
func nothingLeft(t *testing.T) {
	t.Helper()
	for _, kind := range []string{"volumes", "engines", "replicas", "backingimages", "backingimagedatasources", "backingimagemanagers"} {
		eventually(t, "no "+kind, 2*time.Minute, func() string { return strings.Join(c.names(kind+".longhorn.io", system), ", ") })
	}
	eventually(t, "no agents", time.Minute, func() string {
		pods, err := c.kube.CoreV1().Pods(system).List(context.Background(), metav1.ListOptions{
			LabelSelector: "longhorn.io/component in (backing-image-manager, backing-image-data-source)",
		})
		must(t, err)
		var left []string
		for _, one := range pods.Items {
			left = append(left, one.Name)
		}
		return strings.Join(left, ", ")
	})
	// The garbage collector takes them with their objects.
	eventually(t, "no secret of a data source", time.Minute, func() string {
		secrets, err := c.kube.CoreV1().Secrets(system).List(context.Background(), metav1.ListOptions{})
		must(t, err)
		var left []string
		for _, one := range secrets.Items {
			if strings.HasPrefix(one.Name, "backing-image-ds-") {
				left = append(left, one.Name)
			}
		}
		return strings.Join(left, ", ")
	})
	eventually(t, "no loop device", time.Minute, func() string { return strings.Join(loops(), ", ") })
}

func TestYAMLOfTheDocumentsGivesAPodTheFilesOfTheImage(t *testing.T) {
	flow(t)
	image := newImage(t, 32)
	image.copies = 2
	apply(t, image.manifest("bi-download"))
	waitImageReady(t, "bi-download")

	apply(t, image.class("longhorn-backing-image-example", "bi-download", 2))
	apply(t, claimOf("longhorn-backing-image-example", "longhorn-backing-image-example", "Filesystem", "ReadWriteOnce", 64))
	waitBound(t, "longhorn-backing-image-example")
	apply(t, podOf("reader", "longhorn-backing-image-example", "", false))
	waitRunning(t, "reader")
	hasImage(t, "reader")
	in(t, "reader", "echo kept > /data/new && sync")
	if found := in(t, "reader", "cat /data/new"); found != "kept" {
		t.Errorf("the pod reads %q where it wrote `kept`", found)
	}
}

func TestBlockVolumeIsTheImageByteByByte(t *testing.T) {
	flow(t)
	image := newImage(t, 16)
	apply(t, image.manifest("whole"))
	apply(t, image.class("whole", "whole", 1))
	apply(t, claimOf("block", "whole", "Block", "ReadWriteOnce", 16))
	apply(t, podOf("block", "block", "", true))
	waitRunning(t, "block")
	sum := in(t, "block", "head -c 16777216 /dev/volume | sha512sum | cut -d' ' -f1")
	if sum != image.checksum {
		t.Errorf("the device has SHA-512 %s, the image %s", sum, image.checksum)
	}
}

func TestVolumeOfWaitForFirstConsumerIsMadeForItsPod(t *testing.T) {
	flow(t)
	image := newImage(t, 16)
	apply(t, image.class("late", "late", 1, "WaitForFirstConsumer"))
	t.Cleanup(func() { remove(t, object("longhorn.io/v1beta2", "BackingImage", system, "late")) })
	apply(t, claimOf("late", "late", "Filesystem", "ReadWriteOnce", 32))
	waitEvent(t, "default", "PersistentVolumeClaim", "late", "WaitForFirstConsumer")
	if phase := claim(t, "late").Status.Phase; phase != corev1.ClaimPending {
		t.Fatalf("without a pod the claim is %s", phase)
	}
	apply(t, podOf("late", "late", "n2", false))
	waitRunning(t, "late")
	hasImage(t, "late")
}

func TestVolumeIsAttachedOnTheNodeWithoutACopy(t *testing.T) {
	flow(t)
	image := newImage(t, 16)
	apply(t, image.manifest("one-copy"))
	waitImageReady(t, "one-copy")
	apply(t, image.class("one-copy", "one-copy", 1))
	apply(t, claimOf("far", "one-copy", "Filesystem", "ReadWriteOnce", 32))
	waitBound(t, "far")
	volume := claim(t, "far").Spec.VolumeName
	var home string
	eventually(t, "its replica has a place", time.Minute, func() string {
		replicas, err := c.list(t.Context(), "replicas.longhorn.io", system)
		must(t, err)
		for _, one := range replicas {
			if name, _, _ := unstructured.NestedString(one.Object, "spec", "volumeName"); name == volume {
				home, _, _ = unstructured.NestedString(one.Object, "spec", "nodeID")
			}
		}
		if home == "" {
			return "there is no replica of " + volume
		}
		return ""
	})
	other := map[string]string{"n1": "n2", "n2": "n1"}[home]
	for _, node := range []string{other, home} {
		name := "reader-" + node
		text := podOf(name, "far", node, false)
		t.Run("on "+node, func(t *testing.T) {
			apply(t, text)
			waitRunning(t, name)
			hasImage(t, name)
			in(t, name, "echo "+node+" >> /data/nodes && sync")
		})
	}
	apply(t, podOf("both", "far", other, false))
	waitRunning(t, "both")
	if found := in(t, "both", "cat /data/nodes"); found != other+"\n"+home {
		t.Errorf("on %s the pod reads %q, which was written on %s and then %s", other, found, other, home)
	}
}

func TestClaimOfAnImageThatDoesNotMatchSaysWhy(t *testing.T) {
	flow(t)
	image := newImage(t, 16)
	apply(t, image.manifest("pinned"))
	image.checksum = strings.Repeat("ab", 64)
	apply(t, image.class("mismatch", "pinned", 1))
	apply(t, claimOf("mismatch", "mismatch", "Filesystem", "ReadWriteOnce", 32))
	waitEvent(t, "default", "PersistentVolumeClaim", "mismatch", "pinned", "checksum")
	if phase := claim(t, "mismatch").Status.Phase; phase != corev1.ClaimPending {
		t.Errorf("the claim is %s", phase)
	}
}

// An image that cannot be had says so where users look: in its columns, its condition, its events; and is what it is once it can be.
func TestImageThatCannotBeDownloadedSaysWhy(t *testing.T) {
	flow(t)
	image := newImage(t, 16)
	missing := image
	missing.url = strings.Replace(image.url, "image.raw", "missing.raw", 1)
	apply(t, missing.manifest("missing"))
	eventually(t, "the image says why", time.Minute, func() string {
		found, err := c.get(t.Context(), "backingimages.longhorn.io", system, "missing")
		must(t, err)
		if status, why := condition(found, "Ready"); status != "False" || !strings.Contains(why, "404") {
			return why
		}
		return ""
	})
	waitEvent(t, system, "BackingImage", "missing", "404")
}

func TestPasswordOfASourceStandsInNoPod(t *testing.T) {
	flow(t)
	image := newImage(t, 16)
	const password = "word-7f3a"
	image.url = strings.Replace(image.url, "http://", "http://somebody:"+password+"@", 1)
	apply(t, image.manifest("guarded"))
	seen := 0
	eventually(t, "image guarded ready", 2*time.Minute, func() string {
		for _, one := range ours(t, agents, "") {
			if one.Name == "backing-image-ds-guarded" {
				seen++
			}
			text, err := json.Marshal(one)
			must(t, err)
			if strings.Contains(string(text), password) {
				t.Fatalf("pod %s shows the password: %s", one.Name, text)
			}
		}
		found, err := c.get(t.Context(), "backingimages.longhorn.io", system, "guarded")
		must(t, err)
		if status, why := condition(found, "Ready"); status != "True" {
			return why
		}
		return ""
	})
	if seen == 0 {
		t.Error("nobody saw the pod that downloads")
	}
}

func TestReadWriteOncePodAdmitsOnePod(t *testing.T) {
	flow(t)
	image := newImage(t, 16)
	apply(t, image.manifest("alone"))
	apply(t, image.class("alone", "alone", 1))
	apply(t, claimOf("alone", "alone", "Filesystem", "ReadWriteOncePod", 32))
	apply(t, podOf("first", "alone", "", false))
	waitRunning(t, "first")
	apply(t, podOf("second", "alone", "", false))
	waitEvent(t, "default", "Pod", "second", "ReadWriteOncePod")
	hasImage(t, "first")
}
