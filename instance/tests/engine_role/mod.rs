//! What the holder and engine processes of these tests run: the test program itself, as told by its environment.

use std::path::PathBuf;

/// Runs a holder, or with a FUSE descriptor an engine, and ends the process with it. The test that calls it is named `role_process`.
pub fn run() -> ! {
    let config = PathBuf::from(std::env::var("ENGINE_TEST_CONFIG").unwrap());
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<i32>().unwrap());
    let result = match (number("ENGINE_TEST_FD"), number("ENGINE_TEST_LIVES")) {
        (Some(device), Some(lives)) => engine::process::run(&config, device, lives as u32),
        _ => {
            let script = "ENGINE_TEST_FD=$2 ENGINE_TEST_LIVES=$4 exec \"$ENGINE_TEST_EXE\" --exact role_process --ignored --nocapture";
            engine::holder::run(&config, ["sh", "-c", script, "engine"].map(Into::into).to_vec())
        }
    };
    if let Err(error) = result {
        eprintln!("{}", error.chain());
        std::process::exit(1);
    }
    std::process::exit(0);
}
