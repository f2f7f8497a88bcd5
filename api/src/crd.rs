//! The definitions of our custom resources, as `deploy/crds/` holds them.
//!
//! What is generated from the types is tidied up here, so that an API server takes it without complaint:
//! number formats that Kubernetes knows, whole numbers as bounds, no `null` among the values of an enumeration.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Value, json};

use crate::names::{GROUP, VERSION};
use crate::{BackingImage, BackingImageDataSource, BackingImageManager, Engine, Node, Replica, Volume};

/// Every definition.
pub fn all() -> Vec<CustomResourceDefinition> {
    let generated = [
        BackingImage::crd(),
        BackingImageManager::crd(),
        BackingImageDataSource::crd(),
        Volume::crd(),
        Engine::crd(),
        Replica::crd(),
        Node::crd(),
    ];
    let mut all: Vec<_> = generated.into_iter().map(tidy).collect();
    all.push(setting());
    all
}

/// Setting has no `spec`, so its definition is not generated.
fn setting() -> CustomResourceDefinition {
    let schema = json!({
        "type": "object",
        "description": "One global value: metadata.name says which.",
        "required": ["value"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "value": {"type": "string", "description": "The value as text, also of numbers."},
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        },
    });
    let version = json!({
        "name": VERSION,
        "served": true,
        "storage": true,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": "Value", "type": "string", "jsonPath": ".value"},
            {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        ],
    });
    let names = json!({
        "kind": "Setting", "plural": "settings", "singular": "setting", "shortNames": ["lhs"], "listKind": "SettingList",
    });
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("settings.{GROUP}")},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    });
    serde_json::from_value(definition).expect("the text above is a definition")
}

fn tidy(definition: CustomResourceDefinition) -> CustomResourceDefinition {
    let mut value = serde_json::to_value(definition).expect("a definition is JSON");
    for version in value["spec"]["versions"].as_array_mut().into_iter().flatten() {
        tidy_schema(&mut version["schema"]["openAPIV3Schema"]);
    }
    serde_json::from_value(value).expect("tidying leaves a definition")
}

fn tidy_schema(schema: &mut Value) {
    let Some(fields) = schema.as_object_mut() else { return };
    // Kubernetes knows int32 and int64 only; a bound keeps an unsigned number from being negative.
    let format = match fields.get("format").and_then(Value::as_str) {
        Some("uint8" | "uint16" | "int8" | "int16") => Some("int32"),
        Some("uint32" | "uint64" | "uint" | "int") => Some("int64"),
        _ => None,
    };
    if let Some(format) = format {
        fields.insert("format".into(), format.into());
    }
    // An optional enumeration is left out, never null; an API server drops a null of a field that is not nullable.
    if let Some(Value::Array(values)) = fields.get_mut("enum") {
        values.retain(|value| !value.is_null());
        fields.remove("nullable");
    }
    for map in ["properties", "additionalProperties", "items"] {
        match fields.get_mut(map) {
            Some(Value::Object(properties)) if map == "properties" => properties.values_mut().for_each(tidy_schema),
            Some(inner) => tidy_schema(inner),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Visits every schema below a version's schema.
    fn visit(path: &str, schema: &Value, see: &mut impl FnMut(&str, &Value)) {
        see(path, schema);
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            visit(&format!("{path}.{name}"), property, see);
        }
        for inner in ["additionalProperties", "items"] {
            if schema[inner].is_object() {
                visit(&format!("{path}[]"), &schema[inner], see);
            }
        }
    }

    fn each_schema(mut see: impl FnMut(&str, &Value)) {
        for definition in all() {
            let value = serde_json::to_value(&definition).unwrap();
            for version in value["spec"]["versions"].as_array().unwrap() {
                visit(&definition.spec.names.kind, &version["schema"]["openAPIV3Schema"], &mut see);
            }
        }
    }

    #[test]
    fn are_structural() {
        each_schema(|path, schema| {
            let schema = schema.as_object().unwrap_or_else(|| panic!("{path} is not a schema"));
            let kind = schema.get("type").and_then(Value::as_str);
            let free = schema.contains_key("x-kubernetes-preserve-unknown-fields");
            assert!(kind.is_some() || free, "{path} has no type");
            assert!(
                !(schema.contains_key("properties") && schema.contains_key("additionalProperties")),
                "{path}: properties exclude additionalProperties"
            );
            for field in ["$ref", "oneOf", "anyOf", "allOf", "not", "definitions", "$defs", "patternProperties"] {
                assert!(!schema.contains_key(field), "{path} has {field}");
            }
            if let Some(format) = schema.get("format").and_then(Value::as_str) {
                assert!(matches!(format, "int32" | "int64" | "date-time"), "{path} has format {format}");
            }
        });
    }

    #[test]
    fn have_legal_defaults() {
        each_schema(|path, schema| {
            let Some(default) = schema.get("default") else { return };
            let fits = match schema["type"].as_str() {
                Some("string") => default.is_string(),
                Some("integer") => default.is_i64() || default.is_u64(),
                Some("boolean") => default.is_boolean(),
                Some("array") => default.is_array(),
                Some("object") => default.is_object(),
                _ => true,
            };
            assert!(fits, "{path}: {default}");
            if let Some(values) = schema["enum"].as_array() {
                assert!(values.contains(default), "{path}: {default} is none of {values:?}");
            }
        });
    }

    #[test]
    fn name_the_values_of_enumerations() {
        let mut found = vec![];
        each_schema(|path, schema| {
            if let Some(values) = schema["enum"].as_array() {
                assert!(values.iter().all(Value::is_string), "{path}: {values:?}");
                found.push(path.to_owned());
            }
        });
        for path in [
            "BackingImage.spec.sourceType",
            "BackingImage.spec.dataEngine",
            "BackingImage.status.diskFileStatusMap[].state",
            "BackingImageManager.status.currentState",
            "BackingImageDataSource.spec.sourceType",
            "Volume.status.state",
            "Volume.status.robustness",
            "Volume.spec.accessMode",
            "Engine.spec.desireState",
            "Engine.status.replicaModeMap[]",
            "Replica.status.currentState",
            "Node.status.conditions[].status",
        ] {
            assert!(found.iter().any(|f| f == path), "{path} is not among {found:#?}");
        }
    }

    #[test]
    fn keep_unknown_fields_of_every_spec_and_status_and_disk() {
        let mut checked = 0;
        each_schema(|path, schema| {
            let depth = path.matches('.').count();
            let whole = depth == 1 && (path.ends_with(".spec") || path.ends_with(".status"));
            let disk = ["disks[]", "diskStatus[]", "diskFileSpecMap[]"].iter().any(|end| path.ends_with(end));
            if whole || disk {
                assert_eq!(schema["x-kubernetes-preserve-unknown-fields"], true, "{path}");
                checked += 1;
            }
        });
        assert_eq!(checked, 18);
    }
}
