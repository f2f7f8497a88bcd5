//! An HTTP server for one file on loopback, fast enough not to be what is measured.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;

/// Serves a file until the process ends; returns its URL.
pub fn serve(path: &Path) -> io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/image.raw", listener.local_addr()?);
    let path = path.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let path = path.clone();
            // A client that goes away in the middle is its own business.
            thread::spawn(move || drop(answer(stream, path)));
        }
    });
    Ok(url)
}

fn answer(mut stream: TcpStream, path: PathBuf) -> io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while let Some(request) = lines.next().transpose()? {
        let mut first = 0;
        for line in lines.by_ref() {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(range) = line.strip_prefix("range: bytes=") {
                first = range.split('-').next().and_then(|n| n.parse().ok()).unwrap_or(0);
            }
        }
        let mut file = File::open(&path)?;
        let size = file.seek(SeekFrom::End(0))?;
        let status = if first == 0 {
            "200 OK".to_owned()
        } else {
            format!("206 Partial Content\r\nContent-Range: bytes {first}-{}/{size}", size - 1)
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nAccept-Ranges: bytes\r\nETag: \"one\"\r\nContent-Length: {}\r\n\r\n",
            size - first
        );
        stream.write_all(head.as_bytes())?;
        if !request.starts_with("HEAD ") {
            file.seek(SeekFrom::Start(first))?;
            // Between a file and a socket this is sendfile.
            io::copy(&mut file, &mut stream)?;
        }
    }
    Ok(())
}
