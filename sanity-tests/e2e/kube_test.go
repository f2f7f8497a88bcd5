// What flows do with the API: apply YAML, wait with a reason, run commands in pods.
package e2e

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
	"sigs.k8s.io/yaml"
)

// until waits for a condition, which is met when it says nothing; what it said last is the reason of the error.
func until(what string, limit time.Duration, condition func() string) error {
	deadline := time.Now().Add(limit)
	for {
		why := condition()
		if why == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %s in vain for %s: %s", limit, what, why)
		}
		time.Sleep(200 * time.Millisecond) // poll
	}
}

func eventually(t *testing.T, what string, limit time.Duration, condition func() string) {
	t.Helper()
	began := time.Now()
	if err := until(what, limit, condition); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %.1f s", what, time.Since(began).Seconds())
}

func (c *cluster) resource(kind string) (schema.GroupVersionResource, error) {
	plural, group, _ := strings.Cut(kind, ".")
	found, err := c.mapper.ResourceFor(schema.GroupVersionResource{Group: group, Resource: plural})
	if meta.IsNoMatchError(err) {
		c.mapper.Reset()
		found, err = c.mapper.ResourceFor(schema.GroupVersionResource{Group: group, Resource: plural})
	}
	return found, err
}

// get reads an object by its kind as kubectl takes it: `volumes.longhorn.io`.
func (c *cluster) get(ctx context.Context, kind, namespace, name string) (*unstructured.Unstructured, error) {
	resource, err := c.resource(kind)
	if err != nil {
		return nil, err
	}
	return c.dynamic.Resource(resource).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
}

// list reads all objects of a kind.
func (c *cluster) list(ctx context.Context, kind, namespace string) ([]unstructured.Unstructured, error) {
	resource, err := c.resource(kind)
	if err != nil {
		return nil, err
	}
	all, err := c.dynamic.Resource(resource).Namespace(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	return all.Items, nil
}

// names of all objects of a kind, and why there is none to be told.
func (c *cluster) names(kind, namespace string) (found []string) {
	all, err := c.list(context.Background(), kind, namespace)
	if err != nil {
		return []string{err.Error()}
	}
	for _, one := range all {
		found = append(found, one.GetName())
	}
	return found
}

// of is the client for an object's kind and place.
func (c *cluster) of(object *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	kind := object.GroupVersionKind()
	mapping, err := c.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return nil, err
	}
	if mapping.Scope.Name() == meta.RESTScopeNameRoot {
		return c.dynamic.Resource(mapping.Resource), nil
	}
	if object.GetNamespace() == "" {
		object.SetNamespace("default")
	}
	return c.dynamic.Resource(mapping.Resource).Namespace(object.GetNamespace()), nil
}

// apply stores the objects of a text and removes them, in the opposite order, when the test ends.
func apply(t *testing.T, text string) {
	t.Helper()
	for _, one := range strings.Split(text, "\n---\n") {
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(one), &object.Object); err != nil {
			t.Fatalf("%v in\n%s", err, one)
		}
		at, err := c.of(object)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := at.Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
			t.Fatalf("%s %s: %v", object.GetKind(), object.GetName(), err)
		}
		t.Cleanup(func() { remove(t, object) })
	}
}

// remove deletes an object and waits until it is gone. An image is refused as long as replicas of volumes use it that are on their way out.
func remove(t *testing.T, object *unstructured.Unstructured) {
	t.Helper()
	at, err := c.of(object)
	if err != nil {
		t.Error(err)
		return
	}
	began := time.Now()
	defer func() {
		t.Logf("%s %s is gone: %.1f s", object.GetKind(), object.GetName(), time.Since(began).Seconds())
	}()
	ctx := context.Background()
	background := metav1.DeletePropagationBackground
	err = until(fmt.Sprintf("leave to delete %s %s", object.GetKind(), object.GetName()), time.Minute, func() string {
		err := at.Delete(ctx, object.GetName(), metav1.DeleteOptions{PropagationPolicy: &background})
		if err == nil || apierrors.IsNotFound(err) {
			return ""
		}
		return err.Error()
	})
	if err != nil {
		t.Error(err)
		return
	}
	err = until(fmt.Sprintf("the end of %s %s", object.GetKind(), object.GetName()), 2*time.Minute, func() string {
		left, err := at.Get(ctx, object.GetName(), metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return ""
		case err != nil:
			return err.Error()
		default:
			return fmt.Sprintf("finalizers %v, status %v", left.GetFinalizers(), left.Object["status"])
		}
	})
	if err != nil {
		t.Error(err)
	}
}

// object is a name for remove.
func object(apiVersion, kind, namespace, name string) *unstructured.Unstructured {
	o := &unstructured.Unstructured{}
	o.SetAPIVersion(apiVersion)
	o.SetKind(kind)
	o.SetNamespace(namespace)
	o.SetName(name)
	return o
}

// condition is the status of a condition with its reason and sentence.
func condition(object *unstructured.Unstructured, kind string) (status, why string) {
	all, _, _ := unstructured.NestedSlice(object.Object, "status", "conditions")
	for _, one := range all {
		if one, ok := one.(map[string]any); ok && one["type"] == kind {
			return fmt.Sprint(one["status"]), fmt.Sprintf("%s: %v: %v", kind, one["reason"], one["message"])
		}
	}
	return "", "it has no condition " + kind
}

// readyDisk says why a node of ours has no disk that may be used.
func readyDisk(node *unstructured.Unstructured) string {
	if status, why := condition(node, "Ready"); status != "True" {
		return why
	}
	disks, _, _ := unstructured.NestedMap(node.Object, "status", "diskStatus")
	for _, disk := range disks {
		if disk, ok := disk.(map[string]any); ok && fmt.Sprint(disk["diskUUID"]) != "" {
			return ""
		}
	}
	return "it has no disk with a UUID"
}

func claim(t *testing.T, name string) *corev1.PersistentVolumeClaim {
	t.Helper()
	found, err := c.kube.CoreV1().PersistentVolumeClaims("default").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func waitBound(t *testing.T, name string) {
	t.Helper()
	eventually(t, "claim "+name+" bound", time.Minute, func() string {
		if phase := claim(t, name).Status.Phase; phase != corev1.ClaimBound {
			return fmt.Sprintf("it is %s; %s", phase, strings.Join(eventsOf(t, "default", "PersistentVolumeClaim", name), "; "))
		}
		return ""
	})
}

func pod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	found, err := c.kube.CoreV1().Pods("default").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func isReady(pod *corev1.Pod) bool {
	for _, one := range pod.Status.Conditions {
		if one.Type == corev1.PodReady {
			return one.Status == corev1.ConditionTrue
		}
	}
	return false
}

func waitRunning(t *testing.T, name string) {
	t.Helper()
	eventually(t, "pod "+name+" running", 3*time.Minute, func() string {
		if found := pod(t, name); !isReady(found) {
			return fmt.Sprintf("it is %s; %s", found.Status.Phase, strings.Join(eventsOf(t, "default", "Pod", name), "; "))
		}
		return ""
	})
}

// waitEvent waits for an event of an object that has all these words.
func waitEvent(t *testing.T, namespace, kind, name string, words ...string) {
	t.Helper()
	eventually(t, "an event of "+kind+" "+name, time.Minute, func() string {
		all := eventsOf(t, namespace, kind, name)
		for _, event := range all {
			if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(event, word) }) {
				t.Log(event)
				return ""
			}
		}
		return fmt.Sprintf("none of its %d events has all of %q: %q", len(all), words, all)
	})
}

// eventsOf are the sentences of an object's events.
func eventsOf(t *testing.T, namespace, kind, name string) (found []string) {
	t.Helper()
	all, err := c.kube.CoreV1().Events(namespace).List(t.Context(), metav1.ListOptions{
		FieldSelector: "involvedObject.kind=" + kind + ",involvedObject.name=" + name,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all.Items {
		found = append(found, one.Reason+": "+one.Message)
	}
	return found
}

// tryIn runs a shell command in a pod.
func tryIn(ctx context.Context, namespace, pod, container, command string) (string, error) {
	request := c.kube.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("exec")
	request.VersionedParams(&corev1.PodExecOptions{
		Container: container, Command: []string{"sh", "-ec", command}, Stdout: true, Stderr: true,
	}, scheme.ParameterCodec)
	stream, err := remotecommand.NewSPDYExecutor(c.config, "POST", request.URL())
	if err != nil {
		return "", err
	}
	var out, complaint bytes.Buffer
	if err := stream.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &complaint}); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, strings.TrimSpace(complaint.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

// in runs a shell command in a pod of a flow.
func in(t *testing.T, pod, command string) string {
	t.Helper()
	out, err := tryIn(t.Context(), "default", pod, "", command)
	if err != nil {
		t.Fatalf("in pod %s: %s: %v\n%s", pod, command, err, out)
	}
	return out
}

// hasImage: a pod with a claim of an image sees the image's file.
func hasImage(t *testing.T, pod string) {
	t.Helper()
	if found := in(t, pod, "cat /data/hello.txt"); found != hello {
		t.Errorf("pod %s reads %q, the image has %q", pod, found, hello)
	}
}
