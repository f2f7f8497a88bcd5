//! The flows on a real Kubernetes (sanity-tests/e2e) as a step of CI: all of them, or a sentence that says why none.
//!
//! The cluster is built from sources, which takes long where nothing of it is cached. CI has a limit of time, and whoever is stopped
//! by it has shown nothing; so what does not fit is left out, and said.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::ci::Outcome;

/// What CI is allowed, of which a part is for what stands around the steps: installing, cloning, a machine that is slower for a while.
const LIMIT: Duration = minutes(90);
const RESERVE: Duration = minutes(8);
/// The flows, and the cluster without anything cached, as measured on two quiet cores; and how long the steps before took there.
const FLOWS: Duration = minutes(13);
const COLD_BUILD: Duration = minutes(20);
const STEPS_BEFORE: Duration = minutes(35);
/// What the flows run (sanity-tests/cluster/build.sh).
pub const GROUPS: [&str; 3] = ["kube", "csi", "tools"];
const BINARIES: [&str; 9] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "csi-provisioner",
    "csi-attacher",
    "csi-resizer",
];

const fn minutes(n: u64) -> Duration {
    Duration::from_secs(n * 60)
}

/// Builds what is missing of the cluster and runs the flows, if that fits into what is left of CI's time.
pub fn run(root: &Path, elapsed: Duration) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let cache = std::env::var_os("CLUSTER_CACHE").map_or_else(|| root.join("target/cluster"), PathBuf::from);
    let is_cached = BINARIES.iter().all(|name| cache.join("bin").join(name).exists());
    if let Some(why) = too_long(elapsed, is_cached) {
        return Ok(left_out(&why));
    }
    let for_build = LIMIT.saturating_sub(RESERVE + FLOWS + elapsed);
    let built = Command::new("timeout")
        .arg(for_build.as_secs().to_string())
        .arg("sanity-tests/cluster/build.sh")
        .args(GROUPS)
        .current_dir(root)
        .status()
        .context("cannot start `timeout`")?;
    match built.code() {
        Some(0) => {}
        // What coreutils' timeout says.
        Some(124) => {
            return Ok(left_out(&format!("the cluster was not built after {} s", began.elapsed().as_secs())));
        }
        _ => bail!("sanity-tests/cluster/build.sh ended with {built}"),
    }
    let flows = Command::new("go")
        .args(["test", "-count=1", "-timeout=30m", "-v", "."])
        .current_dir(root.join("sanity-tests/e2e"))
        .env("BACKING_IMAGE_CSI_BINARY", crate::release_binary(root))
        .status()
        .context("cannot start `go`: is it installed?")?;
    if !flows.success() {
        bail!("the flows on Kubernetes failed (alone: make e2e FLOWS=TestName)");
    }
    Ok(Outcome::Passed)
}

/// Why the flows do not fit into what is left, on a machine as fast as it has been so far.
fn too_long(elapsed: Duration, is_cached: bool) -> Option<String> {
    let work = if is_cached { FLOWS } else { FLOWS + COLD_BUILD };
    let slowness = (elapsed.as_secs_f64() / STEPS_BEFORE.as_secs_f64()).max(1.0);
    let needed = work.mul_f64(slowness) + RESERVE;
    let minutes = |d: Duration| d.as_secs() / 60;
    (elapsed + needed > LIMIT).then(|| {
        let what = if is_cached { "the flows" } else { "a cluster that must be built first, and the flows," };
        format!("{} of {} minutes are gone, and {what} may need {}", minutes(elapsed), minutes(LIMIT), minutes(needed))
    })
}

fn left_out(why: &str) -> Outcome {
    let why = format!("{why}; `make e2e` runs all flows on Kubernetes");
    eprintln!("e2e: LEFT OUT: {why}");
    Outcome::LeftOut(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_left_out_only_when_they_do_not_fit_and_with_the_reason() {
        assert_eq!(too_long(minutes(0), false), None);
        assert_eq!(too_long(minutes(35), false), None);
        assert_eq!(too_long(minutes(50), true), None);
        assert_eq!(
            too_long(minutes(50), false).as_deref(),
            Some("50 of 90 minutes are gone, and a cluster that must be built first, and the flows, may need 55")
        );
        assert!(too_long(minutes(75), true).is_some());
    }
}
