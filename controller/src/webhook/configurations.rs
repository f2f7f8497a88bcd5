//! The webhook configurations: who the API server asks, and by which authority it knows us. Only the latter is ours to write.

use k8s_openapi::ByteString;
use serde_json::Value;
use store::{ObjectKey, ResourceType, Store, StoreError};

use super::CONFIGURATION;

/// Both kinds of configurations, as far as they exist.
async fn read(store: &Store) -> Result<Vec<(ResourceType, store::Object)>, StoreError> {
    let mut found = vec![];
    for (kind, plural) in [
        ("MutatingWebhookConfiguration", "mutatingwebhookconfigurations"),
        ("ValidatingWebhookConfiguration", "validatingwebhookconfigurations"),
    ] {
        let resource = ResourceType {
            group: "admissionregistration.k8s.io".into(),
            version: "v1".into(),
            kind: kind.into(),
            plural: plural.into(),
            namespaced: false,
        };
        let key = ObjectKey { namespace: None, name: CONFIGURATION.into() };
        if let Some(object) = store.objects().get(&resource, &key).await? {
            found.push((resource, object));
        }
    }
    Ok(found)
}

/// Whether everybody who calls us knows these authorities; also when nobody does.
pub async fn trust(store: &Store, authorities: &str) -> Result<bool, StoreError> {
    let wanted = encoded(authorities);
    let found = read(store).await?;
    Ok(found.iter().flat_map(|(_, object)| webhooks(object)).all(|hook| hook["clientConfig"]["caBundle"] == wanted))
}

/// Writes the authorities where they are missing. What else stands there stays, also what a newer Kubernetes may have there.
pub async fn register(store: &Store, authorities: &str) -> Result<(), StoreError> {
    let wanted = encoded(authorities);
    for (resource, mut object) in read(store).await? {
        let mut changed = false;
        for hook in object.0.get_mut("webhooks").and_then(Value::as_array_mut).into_iter().flatten() {
            if hook["clientConfig"]["caBundle"] != wanted {
                hook["clientConfig"]["caBundle"] = wanted.clone();
                changed = true;
            }
        }
        if changed {
            store.objects().replace(&resource, object).await?;
            tracing::info!(kind = resource.kind, "authority of the webhook written");
        }
    }
    Ok(())
}

fn webhooks(object: &store::Object) -> impl Iterator<Item = &Value> {
    object.0.get("webhooks").and_then(Value::as_array).into_iter().flatten()
}

fn encoded(authorities: &str) -> Value {
    serde_json::to_value(ByteString(authorities.as_bytes().to_vec())).expect("bytes are text in base64")
}
