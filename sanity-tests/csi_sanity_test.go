package sanitytests

import (
	"cmp"
	"fmt"
	"maps"
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

// The README lists the specs that do not apply, with the reason, between these two lines.
const (
	readme       = "../README.md"
	skippedBegin = "<!-- skipped by csi-sanity: written by UPDATE_SKIPPED=1 go test -run TestCSISanity -->\n"
	skippedEnd   = "<!-- end -->\n"
)

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
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begins := strings.Cut(string(text), skippedBegin)
	committed, after, ends := strings.Cut(rest, skippedEnd)
	if !begins || !ends {
		t.Fatalf("%s has no lines `%s` and `%s`", readme, skippedBegin, skippedEnd)
	}
	if committed == table || t.Failed() {
		return
	}
	if os.Getenv("UPDATE_SKIPPED") == "" {
		t.Errorf("the list of skipped specs in %s is not fresh: run this test with UPDATE_SKIPPED=1 and commit it", readme)
	} else if err := os.WriteFile(readme, []byte(before+skippedBegin+table+skippedEnd+after), 0o644); err != nil {
		t.Error(err)
	}
}

// skippedTable is the table of the specs that did not run, the same for both access types: a row for each group of specs and reason.
func skippedTable(report types.Report) string {
	type group struct{ name, reason string }
	rows := map[group][]string{}
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
		key := group{containers[len(containers)-1], cmp.Or(strings.TrimSpace(strings.ReplaceAll(reason, "\n", " ")), "no reason given")}
		key.name = strings.TrimSuffix(key.name, " [Controller Server]")
		if !slices.Contains(rows[key], spec.LeafNodeText) {
			rows[key] = append(rows[key], spec.LeafNodeText)
		}
	}
	groups := slices.SortedFunc(maps.Keys(rows), func(a, b group) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.reason, b.reason))
	})
	var table strings.Builder
	table.WriteString("| group | skipped specs | reason |\n| --- | --- | --- |\n")
	for _, key := range groups {
		slices.Sort(rows[key])
		fmt.Fprintf(&table, "| %s | %s | %s |\n", key.name, strings.Join(rows[key], "; "), key.reason)
	}
	return table.String()
}

// ids makes names that our driver takes for valid, of things that do not exist.
type ids struct{}

func (ids) GenerateUniqueValidVolumeID() string { return "no-such-volume-" + uuid.NewString()[:8] }
func (ids) GenerateInvalidVolumeID() string     { return "no-such-volume" }
func (ids) GenerateUniqueValidNodeID() string   { return "no-such-node-" + uuid.NewString()[:8] }
func (ids) GenerateInvalidNodeID() string       { return "no-such-node" }
