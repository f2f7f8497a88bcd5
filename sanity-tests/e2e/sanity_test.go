// csi-sanity against the sockets of the driver's pods.
package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/google/uuid"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
)

// inside is where the machine finds what a node of the cluster has at a path, the mounts of its pods included.
func inside(t *testing.T, node, path string) string {
	t.Helper()
	out, err := exec.Command(filepath.Join(c.root, "sanity-tests/cluster/cluster.sh"), "status").Output()
	must(t, err)
	found := regexp.MustCompile(`(?m)^mounts-` + node[1:] + `: (\d+)$`).FindSubmatch(out)
	if found == nil {
		t.Fatalf("nobody holds the mounts of node %s:\n%s", node, out)
	}
	return fmt.Sprintf("/proc/%s/root%s", found[1], path)
}

// short is another name for a socket, whose own is too long to connect to.
func short(t *testing.T, socket string) string {
	t.Helper()
	link := filepath.Join(t.TempDir(), "d")
	must(t, os.Symlink(filepath.Dir(socket), link))
	return filepath.Join(link, filepath.Base(socket))
}

func TestCSISanityAgainstTheSocketsOfThePods(t *testing.T) {
	flow(t)
	const kubelet = "/var/lib/kubelet"
	controller := ours(t, controllers, "")[0]
	node := controller.Spec.NodeName
	volumes := filepath.Join(kubelet, "pods", string(controller.UID), "volumes/kubernetes.io~empty-dir")
	image := newImage(t, 16)
	own := filepath.Join(kubelet, "csi-sanity")
	t.Cleanup(func() { must(t, os.RemoveAll(inside(t, node, own))) })
	root := inside(t, node, "")
	gomega.RegisterFailHandler(ginkgo.Fail)
	for _, access := range []string{"mount", "block"} {
		name := "sanity-" + access
		t.Cleanup(func() { remove(t, object("longhorn.io/v1beta2", "BackingImage", system, name)) })
		config := sanity.NewTestConfig()
		config.ControllerAddress = "unix://" + short(t, root+volumes+"/csi/csi.sock")
		config.Address = "unix://" + short(t, root+kubelet+"/plugins/"+driver+"/csi.sock")
		config.TargetPath = filepath.Join(own, access, "target")
		config.StagingPath = filepath.Join(own, access, "staging")
		create := func(path string) (string, error) { return path, os.MkdirAll(root+path, 0o755) }
		config.CreateTargetDir, config.CreateStagingDir = create, create
		removePath := func(path string) error { return os.RemoveAll(root + path) }
		config.RemoveTargetPath, config.RemoveStagingPath = removePath, removePath
		config.CheckPath = func(path string) (sanity.PathKind, error) { return kindOf(root + path) }
		config.TestVolumeAccessType = access
		config.TestVolumeSize = 64 << 20
		config.TestVolumeParameters = image.parameters(name, 2)
		config.TestNodeVolumeAttachLimit = false
		config.IDGen = ids{}
		config.IdempotentCount = 3
		ginkgo.Describe(access, func() { sanity.GinkgoTest(&config) })
	}
	var report types.Report
	ginkgo.ReportAfterSuite("keep the report", func(r types.Report) { report = r })
	suite, reporter := ginkgo.GinkgoConfiguration()
	suite.RandomSeed = 1
	reporter.Succinct = true
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
	passed := 0
	for _, spec := range report.SpecReports {
		if spec.State == types.SpecStatePassed && spec.LeafNodeType == types.NodeTypeIt {
			passed++
		}
	}
	t.Logf("%d specs passed", passed)
	if passed < 60 {
		t.Errorf("only %d specs passed: the suite did not really run", passed)
	}
}

func kindOf(path string) (sanity.PathKind, error) {
	found, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return sanity.PathIsNotFound, nil
	case err != nil:
		return "", err
	case found.IsDir():
		return sanity.PathIsDir, nil
	case found.Mode().IsRegular():
		return sanity.PathIsFile, nil
	default:
		return sanity.PathIsOther, nil
	}
}

// ids makes names that the driver takes for valid, of things that do not exist.
type ids struct{}

func (ids) GenerateUniqueValidVolumeID() string { return "no-such-volume-" + uuid.NewString()[:8] }
func (ids) GenerateInvalidVolumeID() string     { return "no-such-volume" }
func (ids) GenerateUniqueValidNodeID() string   { return "no-such-node-" + uuid.NewString()[:8] }
func (ids) GenerateInvalidNodeID() string       { return "no-such-node" }
