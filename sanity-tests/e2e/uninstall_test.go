// The last flow: the driver goes, and nothing of it stays.
package e2e

import (
	"os"
	"strings"
	"testing"
	"time"
)

// Go runs tests in the order of files and lines; this file's name comes after those of all other flows.
func TestUninstallLeavesNothing(t *testing.T) {
	timed(t)
	nothingLeft(t)
	manifests, err := c.manifests()
	must(t, err)
	// Node and Setting objects are ours as well; without their definitions there are none.
	if err := c.script("kubectl", "delete", "-f", manifests, "--wait=true", "--timeout=120s"); err != nil {
		t.Error(err)
	}
	eventually(t, "no pod, definition or driver", time.Minute, func() string {
		c.mapper.Reset()
		var left []string
		for _, kind := range []string{"customresourcedefinitions.apiextensions.k8s.io", "csidrivers.storage.k8s.io",
			"clusterroles.rbac.authorization.k8s.io", "namespaces", "persistentvolumes", "volumeattachments.storage.k8s.io",
			"mutatingwebhookconfigurations.admissionregistration.k8s.io", "validatingwebhookconfigurations.admissionregistration.k8s.io"} {
			for _, name := range c.names(kind, "") {
				if strings.Contains(name, "longhorn") || strings.Contains(name, "backing-image") {
					left = append(left, kind+"/"+name)
				}
			}
		}
		return strings.Join(left, ", ")
	})
	eventually(t, "nothing on the machine that was not there before", time.Minute, func() string {
		before := strings.Join(c.before, "\n")
		var left []string
		for _, one := range inventory() {
			if !strings.Contains(before, one) {
				left = append(left, one)
			}
		}
		return strings.Join(left, ", ")
	})
	for _, folder := range []string{"own/var/lib/longhorn/replicas", "own/var/lib/longhorn/backing-images", "own/var/lib/longhorn/tmp"} {
		for _, node := range []string{"n1", "n2"} {
			entries, _ := os.ReadDir(c.state + "/" + node + "/" + folder)
			for _, entry := range entries {
				t.Errorf("on %s there is %s/%s left", node, folder, entry.Name())
			}
		}
	}
}
