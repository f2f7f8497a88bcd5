// The cluster: brought up by sanity-tests/cluster, with the driver's image and deploy/manifests, and taken down.
package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	system = "longhorn-system"
	driver = "driver.longhorn.io"
	nodes  = 2
	// Where the nodes reach this process: the bridge of the cluster.
	outside = "10.117.0.1"
)

type cluster struct {
	root, state string
	binary      string
	config      *rest.Config
	kube        kubernetes.Interface
	dynamic     dynamic.Interface
	mapper      *restmapper.DeferredDiscoveryRESTMapper
	// What the machine had before.
	before []string
}

func newCluster() (*cluster, error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return nil, err
	}
	c := &cluster{root: root, state: os.Getenv("CLUSTER_STATE"), binary: os.Getenv("BACKING_IMAGE_CSI_BINARY")}
	if c.state == "" {
		c.state = "/var/lib/backing-image-e2e"
		os.Setenv("CLUSTER_STATE", c.state)
	}
	if c.binary == "" {
		c.binary = filepath.Join(root, "target/release/backing-image-csi")
	}
	if _, err := os.Stat(c.binary); err != nil {
		return nil, fmt.Errorf("%w; build it (cargo build --release) or set BACKING_IMAGE_CSI_BINARY", err)
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("it needs root: namespaces, mounts and cgroups")
	}
	return c, nil
}

func (c *cluster) up() error {
	// What a run left that was killed.
	if err := c.script("wipe"); err != nil {
		return err
	}
	c.before = inventory()
	times.begin("sidecars and tools (built when not cached)")
	if err := c.run("sanity-tests/cluster/build.sh", "kube", "csi", "tools"); err != nil {
		return err
	}
	times.begin("image")
	reference, err := c.manifestImage()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(c.state, "images"), 0o755); err != nil {
		return err
	}
	archive := filepath.Join(c.state, "images", "driver.tar")
	if err := c.run("deploy/image/build.sh", "-b", c.binary, "-r", reference, "-o", archive); err != nil {
		return err
	}
	if err := c.script("sidecar-images"); err != nil {
		return err
	}
	times.begin("cluster")
	os.Setenv("FAST", "1") // a lost node is noticed in 8 s
	if err := c.script("up", fmt.Sprint(nodes)); err != nil {
		return err
	}
	if err := c.connect(); err != nil {
		return err
	}
	times.begin("driver")
	manifests, err := c.manifests()
	if err != nil {
		return err
	}
	if err := c.script("kubectl", "apply", "-f", manifests); err != nil {
		return err
	}
	return until("the driver to be ready", 3*time.Minute, c.driverReady)
}

// manifestImage is the name that the manifests give the driver's image, as containerd spells it.
func (c *cluster) manifestImage() (string, error) {
	text, err := os.ReadFile(filepath.Join(c.root, "deploy/manifests/2-driver.yaml"))
	if err != nil {
		return "", err
	}
	for _, match := range regexp.MustCompile(`(?m)^ *image: (\S+)$`).FindAllStringSubmatch(string(text), -1) {
		if name := match[1]; !strings.Contains(name, "/sig-storage/") {
			if !strings.Contains(name, "/") {
				name = "docker.io/library/" + name
			}
			return name, nil
		}
	}
	return "", fmt.Errorf("deploy/manifests name no image of the driver")
}

// manifests is the folder to install from: deploy/manifests, or with HELM_ARGS ("--set controller.replicas=3") the chart rendered so.
func (c *cluster) manifests() (string, error) {
	folder := filepath.Join(c.root, "deploy/manifests")
	args := strings.Fields(os.Getenv("HELM_ARGS"))
	if len(args) == 0 {
		return folder, nil
	}
	cache := os.Getenv("CLUSTER_CACHE")
	if cache == "" {
		cache = filepath.Join(c.root, "target/cluster")
	}
	args = append([]string{"template", "backing-image-csi", filepath.Join(c.root, "deploy/chart"),
		"--namespace", system, "--kube-version", "v1.34.4", "--set", "createNamespace=true", "--include-crds"}, args...)
	text, err := exec.Command(filepath.Join(cache, "bin/helm"), args...).Output()
	if err != nil {
		return "", fmt.Errorf("helm %s: %w", strings.Join(args, " "), err)
	}
	folder = filepath.Join(c.state, "manifests")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return "", err
	}
	return folder, os.WriteFile(filepath.Join(folder, "driver.yaml"), text, 0o644)
}

func (c *cluster) connect() (err error) {
	if c.config, err = clientcmd.BuildConfigFromFlags("", filepath.Join(c.state, "admin.kubeconfig")); err != nil {
		return err
	}
	// Tests ask often; the server is theirs alone.
	c.config.QPS, c.config.Burst = 200, 400
	if c.kube, err = kubernetes.NewForConfig(c.config); err != nil {
		return err
	}
	if c.dynamic, err = dynamic.NewForConfig(c.config); err != nil {
		return err
	}
	c.mapper = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(c.kube.Discovery()))
	return nil
}

// driverReady: every pod of ours is, every kubelet knows the driver, and every node has a disk that may be used.
func (c *cluster) driverReady() string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	deployment, err := c.kube.AppsV1().Deployments(system).Get(ctx, "backing-image-csi-controller", metav1.GetOptions{})
	if err != nil {
		return err.Error()
	}
	if ready, want := deployment.Status.ReadyReplicas, *deployment.Spec.Replicas; ready < want || !rolledOut(deployment) {
		return fmt.Sprintf("%d of %d controllers are ready", ready, want)
	}
	for _, name := range []string{"backing-image-csi-node", "backing-image-csi-instance"} {
		set, err := c.kube.AppsV1().DaemonSets(system).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err.Error()
		}
		if set.Status.NumberReady < nodes {
			return fmt.Sprintf("%s: %d of %d are ready", name, set.Status.NumberReady, nodes)
		}
	}
	for n := 1; n <= nodes; n++ {
		name := fmt.Sprintf("n%d", n)
		known, err := c.kube.StorageV1().CSINodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil || len(known.Spec.Drivers) == 0 {
			return "the kubelet of " + name + " does not know the driver"
		}
		node, err := c.get(ctx, "nodes.longhorn.io", system, name)
		if err != nil {
			return err.Error()
		}
		if why := readyDisk(node); why != "" {
			return fmt.Sprintf("node %s: %s", name, why)
		}
	}
	return ""
}

func rolledOut(d *appsv1.Deployment) bool {
	return d.Status.ObservedGeneration >= d.Generation && d.Status.UpdatedReplicas == *d.Spec.Replicas
}

// script runs cluster.sh.
func (c *cluster) script(args ...string) error {
	return c.run("sanity-tests/cluster/cluster.sh", args...)
}

func (c *cluster) run(program string, args ...string) error {
	command := exec.Command(filepath.Join(c.root, program), args...)
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	if err := command.Run(); err != nil {
		return fmt.Errorf("%s %s: %w", program, strings.Join(args, " "), err)
	}
	return nil
}

func (c *cluster) down() {
	if os.Getenv("KEEP") != "" {
		fmt.Printf("kept: CLUSTER_STATE=%s sanity-tests/cluster/cluster.sh kubectl get pods -A\n", c.state)
		return
	}
	if err := c.script("wipe"); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

// explain writes what somebody needs who wants to know why a flow failed.
func (c *cluster) explain(to io.Writer) {
	if c.kube == nil {
		return
	}
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "backingimages,backingimagemanagers,backingimagedatasources,volumes.longhorn.io,engines.longhorn.io,replicas.longhorn.io,nodes.longhorn.io", "-A"},
		{"get", "pvc,pv,volumeattachments", "-A"},
		// What the cluster's missing DNS makes a kubelet say of every pod is no news.
		{"get", "events", "-A", "--sort-by=.lastTimestamp", "--field-selector=type!=Normal,reason!=MissingClusterDNS"},
		{"-n", system, "logs", "-l", "app.kubernetes.io/component=controller", "-c", "controller", "--tail=40", "--prefix"},
		{"-n", system, "logs", "-l", "app.kubernetes.io/component=instance", "--tail=30", "--prefix"},
		{"-n", system, "logs", "-l", "app.kubernetes.io/component=node", "-c", "node", "--tail=30", "--prefix"},
	} {
		fmt.Fprintln(to, "-- kubectl", strings.Join(args, " "))
		command := exec.Command(filepath.Join(c.root, "sanity-tests/cluster/cluster.sh"), append([]string{"kubectl"}, args...)...)
		command.Stdout, command.Stderr = to, to
		_ = command.Run()
	}
}
