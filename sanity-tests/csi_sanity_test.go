package sanitytests

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
)

// skippedFile lists the specs that do not apply, with the reason; the README shows it.
const skippedFile = "skipped.md"

// csi-sanity against the real sockets, for mount and block, with volumes on a real backing image.
func TestCSISanity(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	for _, name := range []string{"sanity-mount", "sanity-block"} {
		removeImage(t, i, name)
	}
	gomega.RegisterFailHandler(ginkgo.Fail)
	for _, accessType := range []string{"mount", "block"} {
		config := sanity.NewTestConfig()
		config.ControllerAddress = "unix://" + i.path("csi", "controller.sock")
		config.Address = "unix://" + i.path("csi", "node-1.sock")
		config.TargetPath = filepath.Join(i.root, accessType+"-target")
		config.StagingPath = filepath.Join(i.root, accessType+"-staging")
		config.TestVolumeAccessType = accessType
		config.TestVolumeSize = 64 * mib
		// The first CreateVolume makes the image.
		config.TestVolumeParameters = imageParameters("sanity-"+accessType, url, image.checksum, 2)
		config.TestNodeVolumeAttachLimit = false
		config.IDGen = ids{}
		config.IdempotentCount = 3
		ginkgo.Describe(accessType, func() { sanity.GinkgoTest(&config) })
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
	if passed < 60 {
		t.Errorf("only %d specs passed: the suite did not really run", passed)
	}
	table := skippedTable(report)
	t.Logf("%d specs passed, skipped:\n%s", passed, table)
	committed, _ := os.ReadFile(skippedFile)
	if string(committed) == table || t.Failed() {
		return
	}
	if os.Getenv("UPDATE_SKIPPED") == "" {
		t.Errorf("%s is not fresh: run this test with UPDATE_SKIPPED=1 and commit it", skippedFile)
	} else if err := os.WriteFile(skippedFile, []byte(table), 0o644); err != nil {
		t.Error(err)
	}
}

// skippedTable is the table of the specs that did not run, the same for both access types.
func skippedTable(report types.Report) string {
	rows := map[string]string{}
	for _, spec := range report.SpecReports {
		if spec.LeafNodeType != types.NodeTypeIt {
			continue
		}
		reason := spec.Failure.Message
		switch spec.State {
		case types.SpecStateSkipped:
		case types.SpecStatePending:
			reason = "csi-sanity itself marks it as pending"
		default:
			continue
		}
		// The first container is the access type.
		containers := slices.DeleteFunc(slices.Clone(spec.ContainerHierarchyTexts[1:]), func(s string) bool { return s == "" })
		name := strings.Join(append(containers, spec.LeafNodeText), " / ")
		rows[name] = cmp.Or(strings.TrimSpace(strings.ReplaceAll(reason, "\n", " ")), "no reason given")
	}
	names := make([]string, 0, len(rows))
	for name := range rows {
		names = append(names, name)
	}
	slices.Sort(names)
	var table strings.Builder
	table.WriteString("| csi-sanity spec that is skipped | reason |\n| --- | --- |\n")
	for _, name := range names {
		fmt.Fprintf(&table, "| %s | %s |\n", name, rows[name])
	}
	return table.String()
}

// ids makes names that our driver takes for valid, of things that do not exist.
type ids struct{}

func (ids) GenerateUniqueValidVolumeID() string { return "no-such-volume-" + uuid.NewString()[:8] }
func (ids) GenerateInvalidVolumeID() string     { return "no-such-volume" }
func (ids) GenerateUniqueValidNodeID() string   { return "no-such-node-" + uuid.NewString()[:8] }
func (ids) GenerateInvalidNodeID() string       { return "no-such-node" }
