//! Tolerations as Longhorn writes them: `KEY=VALUE:EFFECT;KEY:EFFECT`.

use k8s_openapi::api::core::v1::Toleration;

/// Reads tolerations. Without a value any value is tolerated, without an effect every effect; `:` alone tolerates everything.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn tolerations(text: &str) -> Result<Vec<Toleration>, String> {
    text.split(';').map(str::trim).filter(|part| !part.is_empty()).map(toleration).collect()
}

fn toleration(text: &str) -> Result<Toleration, String> {
    let Some((taint, effect)) = text.split_once(':') else {
        return Err(format!("`{text}` is no toleration; write KEY=VALUE:EFFECT or KEY:EFFECT"));
    };
    let effect = effect.trim();
    if !matches!(effect, "" | "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
        return Err(format!(
            "`{effect}` in `{text}` is no effect; there are NoSchedule, PreferNoSchedule and NoExecute"
        ));
    }
    let (key, value) = match taint.split_once('=') {
        Some((key, value)) => (key.trim(), Some(value.trim().to_owned())),
        None => (taint.trim(), None),
    };
    if key.is_empty() && value.is_some() {
        return Err(format!("`{text}` has a value and no key; write KEY=VALUE:EFFECT"));
    }
    Ok(Toleration {
        key: Some(key.to_owned()).filter(|key| !key.is_empty()),
        operator: Some(if value.is_some() { "Equal" } else { "Exists" }.into()),
        value,
        effect: Some(effect.to_owned()).filter(|effect| !effect.is_empty()),
        toleration_seconds: None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn reads_what_longhorn_writes() {
        let read = |text: &str| tolerations(text).map(|all| serde_json::to_value(all).unwrap_or(Value::Null));
        assert_eq!(read(""), Ok(json!([])));
        assert_eq!(
            read("a=b:NoSchedule; c:NoExecute;d:;:"),
            Ok(json!([
                {"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"},
                {"key": "c", "operator": "Exists", "effect": "NoExecute"},
                {"key": "d", "operator": "Exists"},
                {"operator": "Exists"},
            ]))
        );
        for wrong in ["a", "a=b", "a:Never", "=b:NoExecute"] {
            assert!(read(wrong).unwrap_err().contains('`'), "{wrong}");
        }
    }
}
