//! PersistentVolumeClaim: what Kubernetes refuses when its size is changed, in its own words. For the standalone mode; a cluster asks itself.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::StorageClass;

use crate::quantity;

/// Why the wish of a claim for storage may not be changed in this way. `class`: the one that it names, if that exists.
pub fn check_change(
    old: &PersistentVolumeClaim,
    new: &PersistentVolumeClaim,
    class: Option<&StorageClass>,
) -> Result<(), String> {
    let (before, after) = (requested(old), requested(new));
    let forbidden = |why: &str| {
        let name = new.metadata.name.as_deref().unwrap_or_default();
        Err(format!("persistentvolumeclaims \"{name}\" is forbidden: {why}"))
    };
    let Some(after) = after.filter(|after| Some(*after) != before) else { return Ok(()) };
    if before.is_some_and(|before| after < before) {
        // What was not done yet may be taken back.
        if capacity(old).is_none_or(|capacity| after <= capacity) {
            return forbidden("spec.resources.requests.storage: field can not be less than status.capacity");
        }
        return Ok(());
    }
    if old.status.as_ref().and_then(|s| s.phase.as_deref()) != Some("Bound") {
        return forbidden("only bound persistent volume claims can be expanded");
    }
    if class.is_none_or(|class| class.allow_volume_expansion != Some(true)) {
        return forbidden(
            "only dynamically provisioned pvc can be resized and the storageclass that provisions the pvc must support resize (allowVolumeExpansion: true)",
        );
    }
    Ok(())
}

/// Bytes that a claim asks for.
pub fn requested(claim: &PersistentVolumeClaim) -> Option<u64> {
    let requests = claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?;
    quantity::bytes(&requests.get("storage")?.0)
}

/// Bytes that a claim has.
pub fn capacity(claim: &PersistentVolumeClaim) -> Option<u64> {
    quantity::bytes(&claim.status.as_ref()?.capacity.as_ref()?.get("storage")?.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claim(requested: &str, phase: &str, capacity: &str) -> PersistentVolumeClaim {
        let mut claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": "c"},
            "spec": {"resources": {"requests": {"storage": requested}}},
            "status": {"phase": phase},
        }))
        .unwrap();
        if !capacity.is_empty() {
            let given = [("storage".to_owned(), serde_json::from_value(json!(capacity)).unwrap())];
            claim.status.as_mut().unwrap().capacity = Some(given.into());
        }
        claim
    }

    #[test]
    fn a_claim_grows_when_it_is_bound_and_its_class_allows_it() {
        let class = |allowed| StorageClass { allow_volume_expansion: allowed, ..Default::default() };
        let check = |old: &PersistentVolumeClaim, requested: &str, class: Option<&StorageClass>| {
            check_change(old, &claim(requested, "Bound", ""), class).err().unwrap_or_default()
        };
        let (bound, allowed) = (claim("1Gi", "Bound", "1Gi"), class(Some(true)));
        assert_eq!(check(&bound, "2Gi", Some(&allowed)), "");
        assert_eq!(check(&bound, "1024Mi", None), "", "it is the same");
        for class in [None, Some(&class(None)), Some(&class(Some(false)))] {
            let said = check(&bound, "2Gi", class);
            assert!(said.contains("the storageclass that provisions the pvc must support resize"), "{said}");
        }
        let said = check(&claim("1Gi", "Pending", ""), "2Gi", Some(&allowed));
        assert!(said.contains("only bound persistent volume claims"), "{said}");
    }

    #[test]
    fn a_claim_never_shrinks_below_what_it_has() {
        let check = |has: &str, requested: &str| {
            check_change(&claim("4Gi", "Bound", has), &claim(requested, "Bound", ""), None).err().unwrap_or_default()
        };
        assert_eq!(check("2Gi", "3Gi"), "", "what was not done yet is taken back");
        for (has, requested) in [("2Gi", "2Gi"), ("2Gi", "1Gi"), ("4Gi", "3Gi"), ("", "3Gi")] {
            let said = check(has, requested);
            assert!(said.contains("can not be less than status.capacity"), "{has} {requested}: {said}");
        }
    }
}
