//! Owns: undoing the compression a server applies to what it sends; the only use of flate2 and lz4_flex.
//! Does not own: our own objects (`decode`), what the bytes are, where reading blocks. Pure.

use std::io::{self, BufReader, Read};

/// A server's zstd window is at most this large with levels up to 19; with `long` it could be 2 GiB.
const WINDOW_LOG_MAX: u32 = 27;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Gzip,
    Lz4,
    Zstd,
}

/// What `compressed` holds. Damage is an error of kind `InvalidData` or `UnexpectedEof`.
pub fn reader<'a>(method: Method, compressed: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    Ok(match method {
        Method::Gzip => Box::new(flate2::read::MultiGzDecoder::new(compressed)),
        Method::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(BufReader::new(compressed))),
        Method::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(compressed)?;
            decoder.window_log_max(WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn compressed(method: Method, raw: &[u8]) -> Vec<u8> {
        match method {
            Method::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(raw).unwrap();
                encoder.finish().unwrap()
            }
            Method::Lz4 => {
                let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
                encoder.write_all(raw).unwrap();
                encoder.finish().unwrap()
            }
            Method::Zstd => zstd::stream::encode_all(raw, 1).unwrap(),
        }
    }

    #[test]
    fn each_method_gives_back_what_was_compressed_and_notices_an_end_in_between() {
        let raw: Vec<u8> = (0..300_000u32).map(|i| (i / 7 % 251) as u8).collect();
        for method in [Method::Gzip, Method::Lz4, Method::Zstd] {
            let whole = compressed(method, &raw);
            let mut found = Vec::new();
            reader(method, &whole[..]).unwrap().read_to_end(&mut found).unwrap();
            assert!(found == raw, "{method:?}");
            // lz4's frames end with a mark of four bytes; what lies before it is all there without it.
            let almost = whole.len() - if method == Method::Lz4 { 5 } else { 1 };
            for length in [1, 3, whole.len() / 2, almost] {
                let cut = reader(method, &whole[..length]).unwrap().read_to_end(&mut Vec::new());
                assert!(cut.is_err(), "{method:?} cut to {length} of {}", whole.len());
            }
        }
    }
}
