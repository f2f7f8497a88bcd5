//! JSON: `backing.cfg`, `replica.json`, and the lines of the control protocols.

use std::fmt::Debug;

use agent::config_file::FileConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What was understood survives being written and read again, and stays on one line.
fn check<T: DeserializeOwned + Serialize + PartialEq + Debug>(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(data) else { return };
    let text = serde_json::to_vec(&value).expect("plain data serializes");
    assert!(!text.contains(&b'\n'), "a message is one line");
    assert_eq!(serde_json::from_slice::<T>(&text).expect("our own text is understood"), value);
}

/// `backing.cfg`.
pub fn file_config(data: &[u8]) {
    let Some(config) = FileConfig::parse(data) else { return };
    let text = serde_json::to_vec(&config).expect("strings and numbers serialize");
    assert_eq!(FileConfig::parse(&text), Some(config));
}

/// Every message and record of the engine's and the replica's protocols.
pub fn lines(data: &[u8]) {
    check::<proto::engine::Config>(data);
    check::<proto::engine::Request>(data);
    check::<proto::engine::Reply>(data);
    check::<proto::replica::Config>(data);
    check::<proto::replica::Record>(data);
    check::<proto::replica::Request>(data);
    check::<proto::replica::Reply>(data);
}
