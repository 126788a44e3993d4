<?php
// Reads a case per line, its five parts in base64: secret, id, timestamp, signatures, body; answers each with
// "accepted" or "refused: why". The first argument is the folder of autoload.php.
require $argv[1] . "/autoload.php";

while (($line = fgets(STDIN)) !== false) {
    [$secret, $id, $timestamp, $signatures, $body] = array_map("base64_decode", explode("\t", rtrim($line, "\n")));
    $headers = ["webhook-id" => $id, "webhook-timestamp" => $timestamp, "webhook-signature" => $signatures];
    try {
        (new StandardWebhooks\Webhook($secret))->verify($body, $headers);
        $verdict = "accepted";
    } catch (Throwable $error) {
        $verdict = "refused: " . get_class($error) . " " . strtok($error->getMessage(), "\n");
    }
    echo $verdict, "\n";
    flush();
}
