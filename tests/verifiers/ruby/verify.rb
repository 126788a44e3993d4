# Reads a case per line, its five parts in base64: secret, id, timestamp, signatures, body; answers each with
# "accepted" or "refused: why".
require "json"
require "standardwebhooks"

$stdout.sync = true
$stdin.each_line(chomp: true) do |line|
  secret, id, timestamp, signatures, body = line.split("\t", -1).map { |part| part.unpack1("m0") }
  headers = { "webhook-id" => id, "webhook-timestamp" => timestamp, "webhook-signature" => signatures }
  begin
    StandardWebhooks::Webhook.new(secret).verify(body, headers)
    puts "accepted"
  rescue JSON::ParserError
    # It reads the body once the signature was right, and an empty one is no JSON.
    puts "accepted"
  rescue StandardError => error
    puts "refused: #{error.inspect}"
  end
end
