//! The difference of two JSON values as a JSON Patch (RFC 6902), as an API server wants it.

use serde_json::{Value, json};

/// What makes `old` into `new`. Lists are replaced as a whole.
pub fn between(old: &Value, new: &Value) -> Vec<Value> {
    let mut patch = vec![];
    compare("", old, new, &mut patch);
    patch
}

fn compare(path: &str, old: &Value, new: &Value, patch: &mut Vec<Value>) {
    let (Value::Object(before), Value::Object(after)) = (old, new) else {
        if old != new {
            patch.push(json!({ "op": "replace", "path": path, "value": new }));
        }
        return;
    };
    let below = |key: &str| format!("{path}/{}", key.replace('~', "~0").replace('/', "~1"));
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        patch.push(json!({ "op": "remove", "path": below(key) }));
    }
    for (key, value) in after {
        match before.get(key) {
            Some(former) => compare(&below(key), former, value, patch),
            None => patch.push(json!({ "op": "add", "path": below(key), "value": value })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_each_difference_once() {
        let old = json!({ "a": { "b": 1, "c/d~e": 2 }, "f": [1], "g": null, "h": 1 });
        assert_eq!(between(&old, &old), [] as [Value; 0]);
        let new = json!({ "a": { "b": 1, "x": { "y": 1 } }, "f": [1, 2], "g": {}, "h": 1 });
        assert_eq!(
            between(&old, &new),
            [
                json!({ "op": "remove", "path": "/a/c~1d~0e" }),
                json!({ "op": "add", "path": "/a/x", "value": { "y": 1 } }),
                json!({ "op": "replace", "path": "/f", "value": [1, 2] }),
                json!({ "op": "replace", "path": "/g", "value": {} }),
            ]
        );
    }
}
