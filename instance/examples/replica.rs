//! The process `replica --config FILE` alone, for the tests of this room.

use std::path::Path;

use backing_image_instance::replica_process::{Config, run};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, role, flag, file] = args.as_slice() else { panic!("usage: replica replica --config FILE") };
    assert_eq!((role.as_str(), flag.as_str()), ("replica", "--config"));
    let config = Config::read(Path::new(file)).expect("a configuration");
    let shutdown = runtime::shutdown::on_signal().expect("signal handlers");
    if let Err(error) = run(config, shutdown).await {
        let mut source: Option<&dyn std::error::Error> = Some(&error);
        while let Some(cause) = source {
            eprint!("{cause}: ");
            source = cause.source();
        }
        eprintln!();
        std::process::exit(1);
    }
}
